"""Difference penalty: value, and gradient into ``.grad``, of all weights of a network in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import COPY, Case, Side, Unavailable, in_graph
from problem import Problem
from timing import Run, copy
from torch import Tensor, nn

import smoothk
from smoothk import backend, reference

NAME = "difference"
COEFFICIENTS = {
    "first": {1: 1e-3},
    "second": {2: 1e-3},
    "both": {1: 1e-3, 2: 5e-4},
}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
EPS = 1e-8
FLOOR = "floor: grad.add_(w)"  # reads and writes what a fused penalty has to
ALLOCATING = ("eager", "foreach", "compile(autograd)")  # sides whose temporaries are as large as the weights
COPIED = 1 << 30  # bytes of the copy that bandwidths are compared with

Coefficients = Mapping[int, float]
Call = Callable[[Sequence[nn.Parameter]], Run]  # from the weights of one copy to the call that is timed


@dataclass(frozen=True)
class Penalty:
    """Which penalty: one coefficient for each order, and the options of `smoothk.difference_penalty`."""

    coefficients: Coefficients
    dim: tuple[int, ...] = (0,)
    norm: str = "l2"
    normalized: bool = False

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `smoothk.SmoothnessPenalty` and of the reference."""
        return {"dim": self.dim, "norm": self.norm, "normalized": self.normalized}

    @property
    def by_columns(self) -> bool:
        """Whether the columns of ``weight.flatten(1)`` have nothing to do with each other."""
        return self.dim == (0,) and self.norm != "l21" and not self.normalized

    def passes(self, element_size: int) -> int:
        """Bytes per entry: weights read once (twice for a norm over rows or the tensor), gradients read and written."""
        reads = 2 if self.normalized or self.norm == "l21" else 1
        return (reads + 2) * element_size


def cases(options: Any) -> Iterator[Case]:
    """A case for every weight set's penalty that ``options`` asks for."""
    problem = Problem(options.weight_set, options.device, options.dtype)
    for orders in options.orders:
        for norm in options.norm:
            for normalized in options.normalized:
                for dim in options.dim:
                    penalty = Penalty(COEFFICIENTS[orders], dim, norm, normalized)
                    launched = case(problem, orders, penalty, options.backend)
                    yield launched
                    if problem.device.type == "cuda":
                        yield in_graph(launched)


def case(problem: Problem, orders: str, penalty: Penalty, fused_by: str | None = None) -> Case:
    """All sides of one penalty on ``problem``; ``fused_by`` names the backend of the fused ones."""
    problem.expect(partial(reference_value, penalty), by_columns=penalty.by_columns)
    tolerance = TOLERANCES[problem.dtype]
    where = "" if penalty.dim == (0,) else f", dim {','.join(map(str, penalty.dim))}"
    return Case(
        name=f"{orders} order{'s' * (orders == 'both')}, {penalty.norm}{', normalized' * penalty.normalized}{where}",
        options={"coefficients": {str(k): v for k, v in penalty.coefficients.items()}, **penalty.options()},
        sides=sides(problem, penalty, fused_by),
        baselines=("fused", "default backend"),
        tolerances=dict.fromkeys(("value", "gradient", "largest entry"), tolerance),
        device=problem.device,
        reset=problem.reset,
        outputs=problem.grads,
        repeats=len(problem.copies),
        bytes=penalty.passes(problem.dtype.itemsize) * problem.weight_set.parameters,
    )


def sides(problem: Problem, penalty: Penalty, fused_by: str | None = None) -> list[Side]:
    """Every implementation, the floor, and on CUDA the copy that bandwidths are compared with."""
    cuda = problem.device.type == "cuda"
    fused_by = fused_by or ("triton" if cuda else None)
    calls: dict[str, Call] = {"fused": partial(_smoothk, penalty, fused_by)}
    if cuda:
        calls["default backend"] = partial(_smoothk, penalty, None)
    calls["fused, autograd"] = partial(_smoothk_autograd, penalty, fused_by)
    calls["eager"] = partial(_autograd, partial(eager, penalty))
    calls["foreach"] = partial(_foreach, penalty)
    calls["compile(autograd)"] = partial(_compiled_autograd, penalty)
    calls["compile(in place)"] = partial(_compiled_in_place, penalty, None)
    if cuda:
        calls["compile(in place, combo)"] = partial(_compiled_in_place, penalty, {"combo_kernels": True})
    check = partial(problem.errors, penalised=True)
    built = []
    for name, call in calls.items():
        built.append(Side(name, problem.over_copies(call), check, ours=name.startswith("fused")))
        if not cuda and name in ALLOCATING:
            built.append(Side(f"{name}, own process", problem.in_own_process(call), check))
    built.append(Side(FLOOR, problem.over_copies(_floor), partial(problem.errors, penalised=False)))
    if cuda:
        built.append(Side(COPY, partial(copy, problem.device, COPIED), lambda returned: {}, bytes=2 * COPIED))
    return built


def reference_value(penalty: Penalty, weight: Tensor) -> Tensor:
    """The penalty of one float64 weight, coefficients included: the plain definition."""
    terms = (
        c * reference.difference_penalty([weight], order, eps=EPS, **penalty.options())
        for order, c in penalty.coefficients.items()
    )
    return torch.stack(list(terms)).sum()


def smoothness(penalty: Penalty, name: str | None, weights: Sequence[nn.Parameter]) -> smoothk.SmoothnessPenalty:
    """smoothk's penalty on a backend by name, or on the default one if that is a kernel."""
    chosen = backend.choose("difference_penalty", name, weights)
    if name is None and chosen == "torch" and weights[0].device.type == "cpu":
        raise Unavailable(f"no fused kernel for these tensors: {backend.unavailable_reason('cpp') or 'see the dtype'}")
    first, second = (penalty.coefficients.get(order, 0.0) for order in (1, 2))
    return smoothk.SmoothnessPenalty(weights, first_order=first, second_order=second, backend=name, **penalty.options())


def _smoothk(penalty: Penalty, name: str | None, weights: Sequence[nn.Parameter]) -> Run:
    return smoothness(penalty, name, weights).accumulate_grad


def _smoothk_autograd(penalty: Penalty, name: str | None, weights: Sequence[nn.Parameter]) -> Run:
    penalty_of = smoothness(penalty, name, weights)
    return _autograd(lambda _: penalty_of(), weights)


def _autograd(value_of: Callable[[Sequence[Tensor]], Tensor], weights: Sequence[nn.Parameter]) -> Run:
    def run() -> Tensor:
        value = value_of(weights)
        value.backward()
        return value.detach()

    return run


def _compiled_autograd(penalty: Penalty, weights: Sequence[nn.Parameter]) -> Run:
    return _autograd(torch.compile(partial(eager, penalty), fullgraph=True, dynamic=False), weights)


def _compiled_in_place(penalty: Penalty, options: dict[str, Any] | None, weights: Sequence[nn.Parameter]) -> Run:
    accumulate = torch.compile(partial(in_place, penalty), fullgraph=True, dynamic=False, options=options)
    detached, grads = [w.detach() for w in weights], [w.grad for w in weights]
    return lambda: accumulate(detached, grads)


def _floor(weights: Sequence[nn.Parameter]) -> Run:
    detached, grads = [w.detach() for w in weights], [w.grad for w in weights]
    return lambda: torch._foreach_add_(grads, detached)


def _axes(weight: Tensor, penalty: Penalty) -> Iterator[tuple[int, float, int]]:
    """(order, coefficient, axis) of every term that the weight is long enough for."""
    for order, coefficient in penalty.coefficients.items():
        for axis in penalty.dim:
            if axis < weight.dim() and weight.shape[axis] > order:
                yield order, coefficient, axis


def eager(penalty: Penalty, weights: Sequence[Tensor]) -> Tensor:
    """The differentiable penalty as one writes it first: a loop over weights."""
    total = torch.zeros((), device=weights[0].device)
    for weight in weights:
        w = _widened(weight)
        value = None
        for order, coefficient, axis in _axes(weight, penalty):
            term = coefficient * _size(torch.diff(w, n=order, dim=axis), axis, penalty.norm)
            value = term if value is None else value + term
        if value is not None:
            total = total + (value / _scale(w, penalty) if penalty.normalized else value)
    return total


def _widened(weight: Tensor) -> Tensor:
    return weight.to(reference.compute_dtype(weight.dtype))


def _scale(w: Tensor, penalty: Penalty) -> Tensor:
    squares = w.square().sum()
    return squares if penalty.norm == "l2" else squares.sqrt()


def _size(d: Tensor, axis: int, norm: str) -> Tensor:
    if norm == "l2":
        return d.square().sum()
    if norm == "l1":
        return d.abs().sum()
    if norm == "huber":
        return F.huber_loss(d, torch.zeros_like(d), reduction="sum")
    others = [i for i in range(d.dim()) if i != axis]
    squares = d.square().sum(others) if others else d.square()
    return (squares + EPS).sqrt().sum()


def in_place(penalty: Penalty, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """Value, and gradient added into ``grads``, with no autograd: what an expert writes for `torch.compile`.

    One `add_` per weight, the adjoint of the difference spelled with padding: of the forms tried (slices updated in
    place, concatenations, nested differences, flat shifts), the one that inductor makes the fastest code of.
    """
    total = torch.zeros((), device=weights[0].device)
    for weight, grad in zip(weights, grads, strict=True):
        w = _widened(weight)
        value, update = torch.zeros_like(total), None
        for order, coefficient, axis in _axes(weight, penalty):
            size, slope = _size_and_slope(_difference(w, order, axis), axis, penalty.norm)
            term = coefficient * _adjoint(slope, order, axis)
            value, update = value + coefficient * size, term if update is None else update + term
        if update is None:
            continue
        if penalty.normalized:
            squares = w.square().sum()
            scale, power = (squares, 2) if penalty.norm == "l2" else (squares.sqrt(), 1)
            update, value = update / scale - power * value / (scale * squares) * w, value / scale
        grad.add_(update)
        total = total + value
    return total


def _difference(w: Tensor, order: int, axis: int) -> Tensor:
    n = w.shape[axis] - order
    if order == 1:
        return w.narrow(axis, 1, n) - w.narrow(axis, 0, n)
    return w.narrow(axis, 2, n) - 2 * w.narrow(axis, 1, n) + w.narrow(axis, 0, n)


def _adjoint(slope: Tensor, order: int, axis: int) -> Tensor:
    """The transpose of `_difference`."""

    def shifted(before: int) -> Tensor:
        return F.pad(slope, (*(0, 0) * (slope.dim() - 1 - axis), before, order - before))

    if order == 1:
        return shifted(1) - shifted(0)
    return shifted(2) - 2 * shifted(1) + shifted(0)


def _size_and_slope(d: Tensor, axis: int, norm: str) -> tuple[Tensor, Tensor]:
    if norm == "l2":
        return d.square().sum(), 2 * d
    if norm == "l1":
        return d.abs().sum(), d.sign()
    if norm == "huber":
        clamped = d.clamp(-1, 1)
        return (clamped * (d - 0.5 * clamped)).sum(), clamped
    others = [i for i in range(d.dim()) if i != axis]
    squares = d.square().sum(others, keepdim=True) if others else d.square()
    lengths = (squares + EPS).sqrt()
    return lengths.sum(), d / lengths


def _foreach(penalty: Penalty, weights: Sequence[nn.Parameter]) -> Run:
    """`torch._foreach` without autograd: slices of rows are contiguous, so that every step is one multi-tensor call."""
    if penalty != Penalty(penalty.coefficients):
        raise Unavailable("written for l2 along dim 0")
    first, second = (penalty.coefficients.get(order, 0.0) for order in (1, 2))
    long = [w for w in weights if len(w) > 1]
    if any(w.dtype in (torch.bfloat16, torch.float16) for w in weights):
        raise Unavailable("written for weights that need no wider arithmetic")
    upper, lower = _slices([w.detach() for w in long], 1)
    grad_upper, grad_lower = _slices([w.grad for w in long], 1)
    last, middle, start = ([w.grad[s] for w in long if len(w) > 2] for s in (slice(2, None), slice(1, -1), slice(-2)))

    def run() -> Tensor:
        d = torch._foreach_sub(upper, lower)
        total = 0.0
        if second:
            e = torch._foreach_sub(*_slices([x for x in d if len(x) > 1], 1))
            torch._foreach_add_(last, e, alpha=2 * second)
            torch._foreach_add_(middle, e, alpha=-4 * second)
            torch._foreach_add_(start, e, alpha=2 * second)
            total = total + second * _sum_of_squares_(e)
        if first:
            torch._foreach_add_(grad_upper, d, alpha=2 * first)
            torch._foreach_add_(grad_lower, d, alpha=-2 * first)
            total = total + first * _sum_of_squares_(d)
        return total

    return run


def _slices(tensors: Sequence[Tensor], shift: int) -> tuple[list[Tensor], list[Tensor]]:
    return [t[shift:] for t in tensors], [t[:-shift] for t in tensors]


def _sum_of_squares_(tensors: list[Tensor]) -> Tensor:
    """Σ x², overwriting ``tensors``. On the CPU `_foreach_norm` is off by 6e-5 on millions of float32 entries."""
    if tensors[0].device.type == "cuda":
        return torch.stack(torch._foreach_norm(tensors)).square().sum()
    torch._foreach_mul_(tensors, tensors)
    return torch.stack([t.sum() for t in tensors]).sum()
