"""Which rank for which layer: a plan for the whole model under one budget.

Every layer has a list of choices, dense or factorised at some rank, each with a cost (parameters, MACs or time) and an
error (the share of ``Σσ²`` that it drops, or what calibration inputs say of it); `smoothk.allocation` spends the budget
on them. The paper's rank rule is not published in detail; the default is our reading.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .allocation import METHODS, Choice, allocate
from .calibration import check_calibration
from .candidates import check_finite, check_trained, find_candidates
from .importance import LIKELIHOODS, direction_importance
from .latency import LayerTimes, measure_layers, measure_model
from .layers import Conv
from .macs import LayerCalls, count_calls
from .modes import outside_inference_mode
from .outputs import first_batches
from .rank_plan import LayerPlan, RankPlan
from .svd import full_rank, parameters_per_rank, squared_singular_values

SCHEMES = ("channel", "spatial", "auto")
COSTS = ("params", "macs", "latency")


@outside_inference_mode
def plan_ranks(
    model: nn.Module,
    keep: float = 0.3,
    *,
    method: str = "global",
    scheme: str = "auto",
    cost: str = "params",
    rank_multiple: int = 1,
    example_input: Tensor | tuple | dict | None = None,
    calibration: Iterable | None = None,
    likelihood: str = "auto",
    exclude: Iterable[str] = (),
) -> RankPlan:
    """Choose every layer's rank so that the whole model costs at most ``keep`` of what it does.

    Args:
        model: any module; it is not changed. On the meta device, where there are no singular values, they are taken to
            fall linearly (the quarter-circle law of a random square matrix).
        keep: fraction in (0, 1] of ALL the model's parameters (tied ones once, buffers not), MACs or time that may
            remain. It is never exceeded, and filled as far as the ranks allow.
        method: how the budget is spent: ``"uniform"``, every layer keeps the same fraction of its own cost;
            ``"energy"``, every layer keeps the same share of its ``Σσ²``; ``"global"``, the sum over all layers of the
            dropped shares is smallest.
        scheme: ``"channel"``, ``"spatial"`` (1x1 and non-2-d layers have the channel scheme), or ``"auto"``, per
            layer. A layer stays dense where its factors would be larger.
        cost: ``"params"``, ``"macs"`` or ``"latency"``. MACs count convolutions and linear layers, per call of
            ``example_input``. Latency is that of the model on ``example_input`` on this machine with the present number
            of threads: every layer is timed dense and at a few ranks, the rest of the model counts as unchanged. It is
            noisy, so two calls can give two plans, and takes up to half a second for each layer.
        rank_multiple: ranks are multiples of this (8 or 16 suit tensor cores).
        example_input: a tensor, or the tuple or dict of the model's arguments; needed for ``cost="macs"`` and
            ``"latency"``, and makes the plan report MACs otherwise.
        calibration: re-iterable of unlabelled input batches, of which the first 512 inputs or a little more are used.
            With ``"global"`` the sum over all layers of the dropped directions' importance to the output is smallest
            instead: the Fisher information of pseudo-labels, see `smoothk.importance`. It takes 32 gradients of a copy
            of the model, which has to be differentiable.
        likelihood: what the outputs are to ``calibration``: ``"categorical"``, logits of classes along axis 1, as
            `torch.nn.functional.cross_entropy` takes them (not the last axis, where language models have them);
            ``"bernoulli"``, a logit in each entry (several labels); ``"gaussian"``, values; ``"auto"``: an only output
            ``[N, d]``, ``d > 1``, is taken for logits of classes, with some doubt, and everything else for values.
            Several outputs are taken alike.
        exclude: names of modules to leave dense, with everything inside them.

    Returns:
        The plan; layers that cannot be factorised are listed as dense with the reason.

    Raises:
        ValueError: an option out of range, an unknown name in ``exclude``, a model without a layer to factorise, a
            weight with NaN or Inf (the layer is named), or an impossible ``keep`` (the message has the smallest that
            works).
        TypeError: an argument of the wrong type, or a calibration iterable that can be read only once.
    """
    check_keep(keep)
    planner = RankPlanner(
        model,
        method=method,
        scheme=scheme,
        cost=cost,
        rank_multiple=rank_multiple,
        example_input=example_input,
        calibration=calibration,
        likelihood=likelihood,
        exclude=exclude,
    )
    return planner.plan(keep)


class RankPlanner:
    """Plans of several sizes for one model: what does not depend on the size is found out once.

    These are the singular values, and importances and times where they are asked for. The model is taken as it is when
    the planner is made.

    Args:
        model, method, scheme, cost, rank_multiple, example_input, calibration, likelihood, exclude: as in `plan_ranks`.

    Raises:
        ValueError, TypeError: as `plan_ranks`, but for ``keep``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        method: str = "global",
        scheme: str = "auto",
        cost: str = "params",
        rank_multiple: int = 1,
        example_input: Tensor | tuple | dict | None = None,
        calibration: Iterable | None = None,
        likelihood: str = "auto",
        exclude: Iterable[str] = (),
    ) -> None:
        _check_options(model, method, scheme, cost, rank_multiple, example_input, calibration, likelihood)
        found = find_candidates(model)
        layers, refused = _exclude(model, found.layers, found.refused, exclude)
        check_finite(layers)
        check_trained(model)
        calls = None if example_input is None else count_calls(model, example_input)
        reached = calls or {}
        if cost != "params":
            idle = [name for name in layers if name not in reached]
            refused.update(dict.fromkeys(idle, "example_input does not reach it"))
            layers = {name: layer for name, layer in layers.items() if name in reached}
        if not layers:
            listed = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in refused.items())
            if "low-rank already" in refused.values():
                listed += "; smoothk.decompress makes low-rank layers dense again"
            raise ValueError(f"model has no layer to factorise ({listed or 'no convolution or linear layer'})")
        times: dict[str, LayerTimes] = {}
        if cost == "latency":
            _check_on_hardware(model)
            times = measure_layers(model, example_input, layers, lambda layer: _schemes(layer, scheme))
        importance: dict[str, dict[str, Tensor]] = {}
        batches = [] if calibration is None or method != "global" else first_batches(calibration)
        if batches:
            importance = direction_importance(model, layers, lambda layer: _schemes(layer, scheme), batches, likelihood)
        self._method, self._cost = method, cost
        self._choices: dict[str, list[Choice]] = {}
        for name, layer in layers.items():
            measured = reached.get(name), times.get(name), importance.get(name)
            self._choices[name] = _choices(layer, scheme, cost, rank_multiple, *measured)
        self._parameters = _count_parameters(model)
        self._limits = [f"with rank_multiple={rank_multiple}"] if rank_multiple > 1 else []
        if cost == "params":
            self._limits += _largest_fixed(model, layers, refused)
        self._macs = None if calls is None else sum(c.dense for c in calls.values())
        self._dense = {
            name: _dense_plan(layers.get(name, module), _macs(calls, name), refused.get(name))
            for name, module in model.named_modules()
            if name in layers or name in refused
        }
        if cost == "params":
            self._total = self._parameters
        elif cost == "macs":
            self._total = sum(c.dense for c in reached.values())
        else:  # a layer in the model can be faster than alone, its input still in cache
            self._total = max(measure_model(model, example_input), sum(t.dense for t in times.values()))

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that a plan may factorise."""
        return tuple(self._choices)

    def plan(self, keep: float) -> RankPlan:
        """The plan of one size, as `plan_ranks` makes it.

        Raises:
            ValueError, TypeError: ``keep`` is no number in (0, 1], or less than works (the message has the smallest).
        """
        check_keep(keep)
        keep = float(keep)  # of numpy's, JSON takes float64 alone
        total, choices = self._total, self._choices
        fixed = total - sum(options[-1].cost for options in choices.values())
        budget = math.floor(keep * total)
        smallest = fixed + sum(options[0].cost for options in choices.values())
        if smallest > budget:
            least = f"keep must be at least {_decimal_above(smallest, total)} for this model, got {keep}"
            raise ValueError("; ".join([least, *self._limits]))
        picked = allocate(choices, budget - fixed, self._method)
        plan = self._plan(picked, keep)
        if self._cost == "latency":
            after = fixed + sum(choices[name][i].cost for name, i in picked.items())
            plan = replace(plan, latency_before=total / 1e9, latency=after / 1e9)
        return plan

    def _plan(self, picked: Mapping[str, int], keep: float) -> RankPlan:
        plans = {}
        for name, dense in self._dense.items():
            if dense.reason is not None:
                plans[name] = dense
                continue
            choice = self._choices[name][picked[name]]
            plans[name] = replace(
                dense,
                scheme=choice.scheme,
                rank=choice.rank,
                parameters=choice.parameters,
                energy=1 - choice.dropped,
                macs=None if self._macs is None else choice.macs,
                reason="no rank is smaller" if len(self._choices[name]) == 1 else None,
            )
        after = self._parameters - sum(p.parameters_before - p.parameters for p in plans.values())
        macs = None
        if self._macs is not None:
            macs = self._macs - sum((p.macs_before or 0) - (p.macs or 0) for p in plans.values())
        return RankPlan(self._method, self._cost, keep, self._parameters, after, self._macs, macs, plans)


def check_keep(keep: float) -> None:
    """Raise unless this is a share that may remain."""
    if not isinstance(keep, Real) or isinstance(keep, bool):
        raise TypeError(f"keep must be a number, got {type(keep).__name__}")
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")


def _check_options(
    model: nn.Module,
    method: str,
    scheme: str,
    cost: str,
    rank_multiple: int,
    example_input: object,
    calibration: Iterable | None,
    likelihood: str,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    options = ("method", method, METHODS), ("scheme", scheme, SCHEMES), ("cost", cost, COSTS)
    for name, value, known in (*options, ("likelihood", likelihood, LIKELIHOODS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    if not isinstance(rank_multiple, int) or isinstance(rank_multiple, bool):
        raise TypeError(f"rank_multiple must be an int, got {type(rank_multiple).__name__}")
    if rank_multiple < 1:
        raise ValueError(f"rank_multiple must be a positive int, got {rank_multiple}")
    if calibration is not None:
        check_calibration(model, calibration)
    if cost != "params" and example_input is None:
        raise ValueError(f"example_input must be given for cost={cost!r}, got None")


def _exclude(
    model: nn.Module, layers: Mapping[str, Conv | nn.Linear], refused: Mapping[str, str], exclude: Iterable[str]
) -> tuple[dict[str, Conv | nn.Linear], dict[str, str]]:
    several = isinstance(exclude, Iterable) and not isinstance(exclude, str)
    names = list(exclude) if several else []
    if not several or not all(isinstance(name, str) for name in names):
        raise TypeError(f"exclude must be a sequence of module names, got {exclude!r}")
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"exclude must name modules of the model, got {unknown[0]!r}")
    inside = {id(m) for name in names for m in model.get_submodule(name).modules()}
    kept = {name: layer for name, layer in layers.items() if id(model.get_submodule(name)) not in inside}
    out = {name: "excluded" for name in layers if name not in kept}
    return kept, {**refused, **out}


def _largest_fixed(model: nn.Module, layers: Collection[str], refused: Mapping[str, str]) -> list[str]:
    """Which modules that cannot be factorised have the most parameters, and why they cannot."""
    counts: dict[str, int] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        new = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(map(id, new))
        if name not in layers:
            counts[name] = sum(p.numel() for p in new)
    largest = sorted((name for name in counts if counts[name]), key=lambda name: -counts[name])[:3]
    reasons = {name: refused.get(name, type(model.get_submodule(name)).__name__) for name in largest}
    listed = ", ".join(f"{counts[name]:,} parameters of {name or 'the model'!r} ({reasons[name]})" for name in largest)
    hint = ["smoothk.decompress makes low-rank layers dense again"] if "low-rank already" in reasons.values() else []
    return [f"not factorised are {listed}", *hint] if listed else []


def _check_on_hardware(model: nn.Module) -> None:
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("model must hold values for cost='latency', got parameters on the meta device")


def _count_parameters(model: nn.Module) -> int:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"{name} of the model must have a shape, got a lazy layer's; run the model once before")
    return sum(p.numel() for p in model.parameters())


def _decimal_above(part: int, whole: int) -> str:
    """The smallest decimal with six digits whose share of ``whole`` covers ``part``."""
    millionths = math.ceil(1e6 * part / whole)
    while math.floor(millionths / 1e6 * whole) < part:
        millionths += 1
    return f"{millionths / 1e6:.6f}".rstrip("0").rstrip(".")


def _squares(layer: Conv | nn.Linear, groups: int, scheme: str) -> Tensor:
    """``Σ over groups of σ²`` by rank, descending, float64 ``[full_rank]``."""
    if layer.weight.is_meta:
        size = full_rank(layer.weight.shape, groups, scheme)
        return torch.linspace(1, 1 / size, size, dtype=torch.float64).square()
    return squared_singular_values(layer.weight, groups, scheme).sum(0)


def _schemes(layer: Conv | nn.Linear, scheme: str) -> tuple[str, ...]:
    """What ``scheme`` means for one layer."""
    shape = layer.weight.shape
    if len(shape) != 4 or shape[2] * shape[3] == 1:
        return ("channel",)
    return ("channel", "spatial") if scheme == "auto" else (scheme,)


def _choices(
    layer: Conv | nn.Linear,
    scheme: str,
    cost: str,
    rank_multiple: int,
    calls: LayerCalls | None,
    times: LayerTimes | None,
    importance: Mapping[str, Tensor] | None,
) -> list[Choice]:
    """The layer's choices worth having: by rising cost and falling error, the dense layer last."""
    shape, groups = tuple(layer.weight.shape), getattr(layer, "groups", 1)
    dense_macs = calls.dense if calls else 0
    parameters = layer.weight.numel()
    dense_cost = {"params": parameters, "macs": dense_macs, "latency": times.dense if times else 0}[cost]
    dense = Choice(dense_cost, 0.0, "dense", 0, parameters, dense_macs)
    found = [dense]
    for name in _schemes(layer, scheme):
        squares = _squares(layer, groups, name)
        whole = squares.sum()
        tail = (whole - squares.cumsum(0)).clamp_min(0) / torch.where(whole == 0, 1, whole)
        error = tail if importance is None else importance[name].flip(0).cumsum(0).flip(0).roll(-1)
        if importance is not None:
            error[-1] = 0.0
        per_rank = parameters_per_rank(shape, groups, name)
        macs_per_rank = calls.per_rank(shape, groups, name) if calls else 0
        for rank in range(rank_multiple, len(squares) + 1, rank_multiple):
            macs, params = rank * macs_per_rank, rank * per_rank
            price = times.at(name, rank) if cost == "latency" and times else macs if cost == "macs" else params
            if price >= dense.cost or params >= parameters and cost == "latency":
                break
            found.append(Choice(price, float(error[rank - 1]), name, rank, params, macs, float(tail[rank - 1])))
    found.sort(key=lambda c: (c.cost, c.error))
    best, frontier = math.inf, []
    for choice in found:
        if choice.error < best or choice is dense:
            best = choice.error
            frontier.append(choice)
    return frontier


def _macs(calls: Mapping[str, LayerCalls] | None, name: str) -> int | None:
    if calls is None:
        return None
    return calls[name].dense if name in calls else 0


def _dense_plan(module: nn.Module, macs: int | None, reason: str | None) -> LayerPlan:
    weight, groups = getattr(module, "weight", None), getattr(module, "groups", 1)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
    count = weight.numel() if isinstance(weight, nn.Parameter) else 0
    return LayerPlan(shape, groups, "dense", 0, count, count, 1.0, macs, macs, reason)
