"""Ranks improved by trying: cost is moved between layers while the outputs come closer to the dense model's.

The errors that `smoothk.allocation` adds up say how much of a weight is dropped, not what that does to the output. Here
the compressed model itself is run on a few calibration inputs, batch norm normalising by each batch as it will after
recalibration. A round tries a smaller and a larger choice of every layer, then takes cost from the layers that miss it
least and gives it to those that gain most; it counts only if the whole change helps. No gradient, no label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .allocation import Choice
from .layers import Conv
from .macs import run
from .outputs import floating_tensors, is_logits
from .refit import normalising_by_batch
from .svd import full_rank, truncated_factors
from .unfolding import fold

_STEPS = (0.25, 0.25, 0.12, 0.12)  # shares of a layer's cost that a round moves


def refine(
    model: nn.Module,
    layers: Mapping[str, Conv | nn.Linear],
    choices: Mapping[str, list[Choice]],
    picked: Mapping[str, int],
    budget: int,
    batches: list[Any],
    steps: Sequence[float] = _STEPS,
) -> dict[str, int]:
    """Move cost between layers where that brings the outputs closer to the dense model's.

    Args:
        model: the dense model; not changed.
        layers, choices, picked, budget: as for and from `smoothk.allocation.allocate`.
        batches: inputs; at least one.
        steps: one round for each; a round that finds nothing ends those of its size.

    Returns:
        The index of each layer's choice, the same ones or better, their cost at most ``budget``.
    """
    trial = _Trial(model, layers, choices, batches)
    picked, best = dict(picked), trial.distance(picked)
    exhausted = 0.0
    for step in steps:
        if step == exhausted:
            continue
        moves = _measure_moves(trial, choices, picked, best, step)
        found = None
        for givers in (1, 2, 4, 8):
            candidate = _exchange(choices, picked, budget, *moves, givers)
            if candidate == picked:
                continue
            distance = trial.distance(candidate)
            if distance < best:
                best, found = distance, candidate
        if found is None:
            exhausted = step
        else:
            picked = found
    return picked


Moves = list[tuple[float, str, int]]  # distance per unit of cost, layer, index of the choice


def _measure_moves(
    trial: _Trial, choices: Mapping[str, list[Choice]], picked: dict[str, int], distance: float, step: float
) -> tuple[Moves, Moves]:
    """What every layer's next smaller choice loses, least first, and its next larger one gains, most first."""
    losses, gains = [], []
    for name, options in choices.items():
        now, cost = picked[name], options[picked[name]].cost
        smaller = [i for i in range(now) if options[i].cost <= (1 - step) * cost] or [0]
        larger = [i for i in range(now + 1, len(options)) if options[i].cost >= (1 + step) * cost]
        if now > 0:
            lost = trial.distance({**picked, name: smaller[-1]}) - distance
            losses.append((lost / (cost - options[smaller[-1]].cost), name, smaller[-1]))
        if now + 1 < len(options):
            index = larger[0] if larger else len(options) - 1
            gained = distance - trial.distance({**picked, name: index})
            gains.append((gained / max(options[index].cost - cost, 1), name, index))
    return sorted(losses), sorted(gains, reverse=True)


def _exchange(
    choices: Mapping[str, list[Choice]], picked: dict[str, int], budget: int, losses: Moves, gains: Moves, givers: int
) -> dict[str, int]:
    """``picked`` after up to ``givers`` losses that are smaller than the gains they pay for."""
    new = dict(picked)
    left = budget - sum(options[picked[name]].cost for name, options in choices.items())
    for (loss, giver, index), (gain, _, _) in zip(losses[:givers], gains, strict=False):
        if loss >= gain:
            break
        left += choices[giver][new[giver]].cost - choices[giver][index].cost
        new[giver] = index
    for gain, taker, index in gains:
        if gain <= 0:
            break
        options, now = choices[taker], picked[taker]
        if new[taker] != now:
            continue
        affordable = [i for i in range(now + 1, index + 1) if options[i].cost - options[now].cost <= left]
        if affordable:
            left -= options[affordable[-1]].cost - options[now].cost
            new[taker] = affordable[-1]
    return new


class _Trial:
    """A copy of the model whose weights are set to any choice of ranks, and the dense outputs to compare with."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Conv | nn.Linear],
        choices: Mapping[str, list[Choice]],
        batches: list[Any],
    ) -> None:
        from .compress import deep_copy  # which imports the planner

        self.choices, self.dense = choices, layers
        self.model = deep_copy(model).requires_grad_(False).eval()
        self.layers = {name: self.model.get_submodule(name) for name in layers}
        self.batches = batches
        with torch.no_grad():
            self.wanted = [[t.clone() for t in floating_tensors(run(self.model, batch))] for batch in self.batches]
        self.factors: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self.now = {name: len(options) - 1 for name, options in choices.items()}

    @torch.no_grad()
    def distance(self, picked: Mapping[str, int]) -> float:
        """Mean distance of the outputs, see `_distance`; NaN counts as infinitely far."""
        for name, index in picked.items():
            if self.now[name] != index:
                self.layers[name].weight.copy_(self._weight(name, self.choices[name][index]))
                self.now[name] = index
        total = 0.0
        with normalising_by_batch(self.model):
            for batch, wanted in zip(self.batches, self.wanted, strict=True):
                total += _distance(floating_tensors(run(self.model, batch)), wanted)
        return total if total == total else float("inf")

    def _weight(self, name: str, choice: Choice) -> Tensor:
        layer = self.dense[name]
        if choice.scheme == "dense":
            return layer.weight
        shape, groups, key = layer.weight.shape, getattr(layer, "groups", 1), (name, choice.scheme)
        if key not in self.factors:
            u, v = truncated_factors(layer.weight, full_rank(shape, groups, choice.scheme), groups, choice.scheme)
            dtype = torch.promote_types(layer.weight.dtype, torch.float32)
            self.factors[key] = u.to(dtype), v.to(dtype)
        u, v = self.factors[key]
        return fold(u[..., : choice.rank] @ v[:, : choice.rank], shape, choice.scheme)


def _distance(outputs: list[Tensor], wanted: list[Tensor]) -> float:
    """For one tensor ``[N, classes]``, taken as logits, the Kullback-Leibler divergence from the dense model's summed
    over N; for others the squared difference over the dense model's square."""
    if not wanted:
        raise ValueError("calibration needs a model with floating-point outputs, got none")
    if is_logits(wanted):
        new, old = (x[0].float().log_softmax(1) for x in (outputs, wanted))
        return F.kl_div(new, old, reduction="sum", log_target=True).item()
    pairs = [(new.double(), old.double()) for new, old in zip(outputs, wanted, strict=True)]
    return sum(((new - old).square().sum() / old.square().sum().clamp_min(1e-30)).item() for new, old in pairs)
