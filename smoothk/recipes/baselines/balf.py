"""Activation-whitened SVD with an energy knapsack, as in BALF (arXiv 2509.25136), written from the paper's idea.

A layer's error is measured at its output: with C = Σ x xᵀ over the patches x that the layer reads, ‖(W − W_r) x‖² over
all patches is smallest for the truncated SVD of W C^{1/2}, taken back by the pseudo-inverse of the root. Ranks are
chosen for the whole model so that the kept share of each layer's whitened energy, summed over the layers, is largest.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothk.candidates import find_candidates
from smoothk.compress import replace_layers
from smoothk.layers import Conv, LowRankConv2d, LowRankLinear, _LowRank

IMAGES = 1024  # as many as the paper takes
CHUNK = 64  # images whose patches are unfolded at a time
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class _Whitened:
    """One layer: ``u [rows, full] * σ`` and ``v [full, columns]``, and the share of energy that each rank drops."""

    u: Tensor
    v: Tensor
    dropped: Tensor
    per_rank: int
    dense: int

    def options(self) -> tuple[Tensor, Tensor]:
        """Cost and error of every rank from 1 that is smaller than the dense layer, and of that, which comes last."""
        ranks = torch.arange(1, len(self.dropped) + 1)
        ranks = ranks[ranks * self.per_rank < self.dense]
        cost = torch.cat([ranks * self.per_rank, torch.tensor([self.dense])]).double()
        return cost, torch.cat([self.dropped[: len(ranks)], torch.zeros(1, dtype=torch.float64)])


def whitened_svd(model: nn.Module, batches: Iterable[Tensor], images: int = IMAGES) -> Callable[[float], nn.Module]:
    """Decompose every convolution (of one group) and linear layer of ``model``; other layers stay dense.

    Args:
        model: in evaluation mode; it is not changed.
        batches: unlabelled inputs.
        images: how many of them are used, at most.

    Returns:
        ``keep -> new model`` of at most that share of all parameters; ValueError where rank 1 everywhere is too much.
    """
    found = find_candidates(model).layers
    layers = {n: m for n, m in found.items() if isinstance(m, nn.Linear) or (m.weight.dim() == 4 and m.groups == 1)}
    grams = _input_grams(model, layers, batches, images)
    whitened = {name: _whiten(layer, grams[name]) for name, layer in layers.items() if name in grams}
    total = sum(p.numel() for p in model.parameters())

    def compress(keep: float) -> nn.Module:
        fixed = total - sum(layer.dense for layer in whitened.values())
        picked = _knapsack([layer.options() for layer in whitened.values()], math.floor(keep * total) - fixed)
        if picked is None:
            least = fixed + sum(int(layer.options()[0][0]) for layer in whitened.values())
            raise ValueError(f"keep must be at least {least / total:.4f} for this model, got {keep}")
        new = {
            name: _factorized(layers[name], layer, index + 1)
            for (name, layer), index in zip(whitened.items(), picked, strict=True)
            if index + 1 < len(layer.options()[0])
        }
        return replace_layers(copy.deepcopy(model), new)

    return compress


@torch.no_grad()
def _input_grams(
    model: nn.Module, layers: dict[str, Conv | nn.Linear], batches: Iterable[Tensor], images: int
) -> dict[str, Tensor]:
    """``Σ x xᵀ`` in float64 over the patches that each layer reads."""
    grams: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            for chunk in args[0].split(CHUNK):
                if isinstance(layer, nn.Linear):
                    patches = chunk.flatten(0, -2).T.double()
                else:
                    padding: int | tuple[int, ...]
                    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
                        chunk = F.pad(chunk, layer._reversed_padding_repeated_twice, _MODES[layer.padding_mode])
                        padding = 0
                    else:
                        padding = layer.padding
                    unfolded = F.unfold(chunk, layer.kernel_size, layer.dilation, padding, layer.stride)
                    patches = unfolded.transpose(0, 1).flatten(1).double()
                grams[name] = grams.get(name, 0) + patches @ patches.T

        return hook

    handles = [layer.register_forward_pre_hook(record(name)) for name, layer in layers.items()]
    left = images
    try:
        for batch in batches:
            model(batch[:left])
            left -= len(batch)
            if left <= 0:
                break
    finally:
        for handle in handles:
            handle.remove()
    return grams


_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def _whiten(layer: Conv | nn.Linear, gram: Tensor) -> _Whitened:
    weight = layer.weight.detach().flatten(1).double()
    values, vectors = torch.linalg.eigh(gram)
    # Directions that no input has are rounding: their inverse root would be huge, and nothing is lost without them.
    seen = values > len(values) * torch.finfo(torch.float64).eps * values[-1]
    seen[-1] = True  # if only to have a factor of rank 1 where all inputs are 0
    root, vectors = values[seen].clamp_min(0).sqrt(), vectors[:, seen]
    inverse = torch.where(root > 0, 1 / root, 0)
    u, sigma, v = torch.linalg.svd(weight @ (vectors * root), full_matrices=False)
    squares = sigma.square()
    dropped = (squares.sum() - squares.cumsum(0)).clamp_min(0) / squares.sum().clamp_min(TINY)
    return _Whitened(u * sigma, v @ (vectors * inverse).T, dropped.cpu(), sum(weight.shape), weight.numel())


def _knapsack(options: list[tuple[Tensor, Tensor]], budget: int) -> list[int] | None:
    """An option of each layer, of the smallest sum of errors that a price per unit of cost leads to; None if none fits.

    The price is bisected (Lagrange relaxation); what it leaves over goes to single steps, the most useful ones first.
    """

    def at(price: float) -> list[int]:
        return [int((error + price * cost).argmin()) for cost, error in options]

    def spent(picked: list[int]) -> int:
        return sum(int(cost[i]) for (cost, _), i in zip(options, picked, strict=True))

    if spent([0] * len(options)) > budget:
        return None
    low, high = -60.0, 60.0  # logarithms of the price
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(at(math.exp(middle))) <= budget else (middle, high)
    picked = at(math.exp(high))
    while True:
        room = budget - spent(picked)
        steps = []
        for index, ((cost, error), i) in enumerate(zip(options, picked, strict=True)):
            if i + 1 < len(cost) and cost[i + 1] - cost[i] <= room and error[i + 1] < error[i]:
                steps.append((float((error[i] - error[i + 1]) / (cost[i + 1] - cost[i])), index))
        if not steps:
            return picked
        picked[max(steps)[1]] += 1


@torch.no_grad()
def _factorized(layer: Conv | nn.Linear, whitened: _Whitened, rank: int) -> nn.Module:
    small: _LowRank
    if isinstance(layer, nn.Linear):
        small = LowRankLinear.from_linear(layer, rank)
    else:
        small = LowRankConv2d.from_conv(layer, rank, scheme="channel")
    # A factor of the size of the activations' root in one and of its inverse in the other would waste their precision.
    u, v = whitened.u[:, :rank], whitened.v[:rank]
    balance = (v.norm(dim=1) / u.norm(dim=0).clamp_min(TINY)).sqrt()
    balance = torch.where((balance > 0) & balance.isfinite(), balance, 1)
    small.u.copy_((u * balance).reshape(small.u.shape))
    small.v.copy_((v / balance[:, None]).reshape(small.v.shape))
    return small
