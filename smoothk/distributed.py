"""Penalties of sharded weights (`torch.distributed.tensor.DTensor`, as FSDP2 and tensor parallelism make them).

The value, the same on every rank, and the gradient, on every rank that of its own shard, are those of the whole
weights; nothing is averaged over ranks. Where the axis of the differences is cut over ranks, the differences inside a
shard are taken on the local tensor as it is, and those across a border on strips of a few rows around it. The rows of
other ranks come in one all-to-all per mesh dimension for all weights, the terms are summed by one all-reduce, and
backward communicates nothing. Every rank has to make the same calls in the same order, as with any collective.

Whole weights are gathered, one at a time, only for what needs them whole: the nuclear norm, ``"l21"`` groups that lie
on several ranks, and axes that several mesh dimensions cut (FSDP2 over column-wise tensor parallelism).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate, Shard

from . import functional
from .halo import Cut, Strip, copy_strip, exchange
from .reference import axes_of, total_of

# torch.compile runs these calls as they are, between its graphs.
_not_compiled = torch.compiler.disable(reason="smoothk's penalties of DTensors communicate")


class _Shard(NamedTuple):
    local: Tensor
    strips: list[Strip]


def _sharding(weight: DTensor) -> list[tuple[int, Any]]:
    """``(mesh dimension, placement)`` where ranks hold different parts of ``weight``."""
    mesh = weight.device_mesh
    return [(i, p) for i, p in enumerate(weight.placements) if mesh.size(i) > 1 and not p.is_replicate()]


def _groups(weight: DTensor) -> list[ProcessGroup]:
    return [weight.device_mesh.get_group(mesh_dim) for mesh_dim, _ in _sharding(weight)]


def _all_reduce(values: Tensor, groups: Sequence[ProcessGroup]) -> Tensor:
    for group in groups:
        dist.all_reduce(values, group=group)
    return values


class _SumOverShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, groups: Sequence[ProcessGroup]) -> Tensor:
        return _all_reduce(value.clone(), groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None  # not summed: the same loss is on every rank


@_not_compiled
def sum_over_shards(value: Tensor, weight: DTensor) -> Tensor:
    """Sum over all ranks that hold another part of ``weight`` of what each computed from its own; differentiable."""
    return _SumOverShards.apply(value, _groups(weight))


class _Exchanged:
    """The terms of weights of one device and dtype that the same mesh dimensions cut."""

    def __init__(self, weights: Sequence[DTensor], orders: Sequence[int], dim: Sequence[int], **options: Any) -> None:
        self.orders, self.dim, self.normalized = orders, dim, options.pop("normalized")
        self.options = {**options, "normalized": False}
        self.groups = _groups(weights[0])
        with torch.no_grad():
            self.shards = [_Shard(weight.to_local(), []) for weight in weights]
            for mesh_dim, _ in _sharding(weights[0]):
                self._copy_strips(weights, mesh_dim)

    def _copy_strips(self, weights: Sequence[DTensor], mesh_dim: int) -> None:
        """Copy the rows around the ends of every shard along the axes that ``mesh_dim`` cuts."""
        mesh, width = weights[0].device_mesh, max(self.orders)
        cuts = [
            (shard, Cut(axis, weight.shape[axis], mesh.size(mesh_dim), mesh.get_local_rank(mesh_dim)))
            for weight, shard in zip(weights, self.shards, strict=True)
            for axis in axes_of(weight, self.dim, min(self.orders))
            if weight.placements[mesh_dim].is_shard(axis)
        ]
        if not cuts:  # then no rank has any: shapes decide
            return
        segments = exchange([(cut, shard.local) for shard, cut in cuts], width, mesh.get_group(mesh_dim))
        for (shard, cut), rows in zip(cuts, segments, strict=True):
            first, last = cut.rows(cut.rank)
            for at_end, has_neighbour in ((False, first > 0), (True, last < cut.size)):
                if first < last and has_neighbour:
                    shard.strips.append(copy_strip(rows, cut, width, at_end))

    def terms(self) -> Tensor:
        """The terms of the whole weights, ``[len(orders)]``, float64."""
        if not self.normalized:
            return _all_reduce(self._own_terms(self.shards), self.groups)
        rows = []
        for shard in self.shards:
            squares = torch.linalg.vector_norm(shard.local, dtype=torch.float64).square()
            rows.append(torch.cat([self._own_terms([shard]), squares.view(1)]))
        raw, squares = _all_reduce(torch.stack(rows), self.groups).split([len(self.orders), 1], dim=1)
        self.zero = squares == 0  # not `> 0`: a NaN has to come through
        self.squares = torch.where(self.zero, 1, squares)
        self.scale = self.squares if self.options["norm"] == "l2" else self.squares.sqrt()
        self.values = torch.where(self.zero, 0, raw / self.scale)
        return self.values.sum(0)

    def accumulate(self, grads: Sequence[Tensor], coefficients: Tensor) -> Tensor:
        """``coefficients * terms``, and `add_gradient`: in one pass where the weights are not normalised."""
        if not self.normalized:
            return _all_reduce(self._own_terms(self.shards, grads, coefficients), self.groups)
        terms = self.terms()
        self.add_gradient(grads, coefficients)
        return coefficients * terms

    def add_gradient(self, grads: Sequence[Tensor], coefficients: Tensor) -> None:
        """Add the gradient of ``Σ coefficients[k] * terms[k]`` by every local tensor into ``grads``; after `terms`."""
        if not self.normalized:
            self._own_terms(self.shards, grads, coefficients)
            return
        # With S = Σ W²: d(P / S) = P' / S - 2 P W / S² (l2), d(P / √S) = P' / √S - P W / S^(3/2) (the others).
        power = 2 if self.options["norm"] == "l2" else 1
        factors = torch.where(self.zero, 0, coefficients / self.scale)
        decays = -power * (self.values * coefficients).sum(1) / self.squares.squeeze(1)
        for shard, grad, factor, decay in zip(self.shards, grads, factors, decays, strict=True):
            self._own_terms([shard], [grad], factor)
            grad.addcmul_(shard.local, decay.to(grad.dtype))

    def _own_terms(
        self, shards: Sequence[_Shard], grads: Sequence[Tensor] | None = None, coefficients: Any = ()
    ) -> Tensor:
        """Terms, not normalised, of the differences whose first row is on this rank.

        With ``grads``, to which the gradient of all differences that touch a row on this rank is added, times
        ``coefficients``.
        """
        terms = self._run([shard.local for shard in shards], grads, self.orders, coefficients, self.dim).double()
        targets: Sequence[Tensor | None] = [None] * len(shards) if grads is None else grads
        strips = [(strip, to) for shard, to in zip(shards, targets, strict=True) for strip in shard.strips]
        for kind in sorted({strip.kind for strip, _ in strips}):
            chosen, into = zip(*(pair for pair in strips if pair[0].kind == kind), strict=True)
            _, counted = kind
            if counted or grads is not None:
                crossing = self._crossing_terms(chosen, None if grads is None else into, coefficients)
                terms = terms + crossing if counted else terms
        return terms

    def _crossing_terms(self, strips: Sequence[Strip], targets: Sequence[Tensor] | None, coefficients: Any) -> Tensor:
        """`_own_terms` of strips of one kind; the gradient of their own rows is added into the local ``targets``."""
        grads = None
        if targets is not None:
            grads = [torch.empty_like(s.rows, dtype=to.dtype) for s, to in zip(strips, targets, strict=True)]
            torch._foreach_zero_(grads)
        terms = []
        for k, order in enumerate(self.orders):
            rows = [strip.of_order(order, strip.rows) for strip in strips]
            into = grads and [strip.of_order(order, grad) for strip, grad in zip(strips, grads, strict=True)]
            terms.append(self._run(rows, into, [order], coefficients[k : k + 1], (strips[0].cut.axis,)))
        if grads is not None and targets is not None:
            own = [s.own(grad, to) for s, grad, to in zip(strips, grads, targets, strict=True)]
            torch._foreach_add_(*map(list, zip(*own, strict=True)))
        return torch.cat(terms)

    def _run(self, weights: list[Tensor], grads: Any, orders: Sequence[int], coefficients: Any, dim: Any) -> Tensor:
        if grads is None:
            return functional.difference_terms(weights, orders, dim=dim, **self.options)
        return functional.accumulate_difference_penalty(weights, grads, coefficients, orders, dim=dim, **self.options)


class _Gathered:
    """Terms of weights that are needed whole: gathered one at a time, of the gradient only the own shard is kept."""

    def __init__(self, weights: Sequence[DTensor], evaluate: Callable[[Tensor], Tensor], differentiate: bool) -> None:
        self._terms, self._gradients = [], []
        for weight in weights:
            with torch.no_grad():
                whole = weight.full_tensor().detach()
            with torch.enable_grad():
                terms = evaluate(whole.requires_grad_(differentiate))
                single = terms.unbind() if differentiate else ()
            self._terms.append(terms.detach())
            self._gradients.append(
                [_own_shard(torch.autograd.grad(term, whole, retain_graph=True)[0], weight) for term in single]
            )

    def terms(self) -> Tensor:
        return torch.stack(self._terms).sum(0)

    def accumulate(self, grads: Sequence[Tensor], coefficients: Tensor) -> Tensor:
        self.add_gradient(grads, coefficients)
        return coefficients * self.terms()

    def add_gradient(self, grads: Sequence[Tensor], coefficients: Tensor) -> None:
        for grad, gradients in zip(grads, self._gradients, strict=True):
            for coefficient, gradient in zip(coefficients, gradients, strict=True):
                grad.addcmul_(gradient, coefficient.to(grad.dtype))


@torch.no_grad()
def _own_shard(whole: Tensor, weight: DTensor) -> Tensor:
    """This rank's part, in its own memory, of a tensor that every rank has whole; placed as ``weight``."""
    mesh = weight.device_mesh
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=weight.placements).to_local().clone()


class _Terms(torch.autograd.Function):
    """The terms of ``part``, whose gradient by its weights' local tensors is that of the whole weights' terms."""

    @staticmethod
    def forward(ctx: Any, part: _Exchanged | _Gathered, *local: Tensor) -> Tensor:
        ctx.part = part
        ctx.save_for_backward(*local)
        return part.terms()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_TermsBackward.apply(ctx.part, ctx.needs_input_grad[1:], grad, *ctx.saved_tensors)


class _TermsBackward(torch.autograd.Function):
    """Tied to the weights, so that a second derivative is an error and not silently that of the own shard."""

    @staticmethod
    def forward(
        ctx: Any, part: _Exchanged | _Gathered, needed: Sequence[bool], grad: Tensor, *local: Tensor
    ) -> tuple[Tensor | None, ...]:
        grads = [torch.zeros_like(weight) for weight in local]
        part.add_gradient(grads, grad.double())
        return tuple(g if needs else None for g, needs in zip(grads, needed, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("the penalty of sharded weights (DTensor) has no second derivative")


def check_placement(weight: DTensor, grad: Tensor | None = None) -> None:
    """Raise unless the terms of ``weight`` can be computed and their gradient be added into ``grad``."""
    if any(placement.is_partial() for placement in weight.placements):
        raise ValueError(f"weights must be sharded or replicated DTensors, got placements {weight.placements}")
    if grad is None:
        return
    if not isinstance(grad, DTensor) or grad.device_mesh != weight.device_mesh:
        raise TypeError(f"the gradient of a DTensor must be a DTensor on its mesh, got {type(grad).__name__}")
    if any(placement.is_partial() and not placement.is_partial("sum") for placement in grad.placements):
        raise ValueError(f"gradients may be Partial only as sums, got placements {grad.placements}")


def _needs_gathering(weight: DTensor, orders: Sequence[int], dim: Sequence[int], norm: str) -> bool:
    placements = [placement for _, placement in _sharding(weight)]
    if any(type(placement) is not Shard for placement in placements):
        return True
    cut, along = [placement.dim for placement in placements], set(axes_of(weight, dim, min(orders)))
    groups_cut = norm == "l21" and any(along - {axis} for axis in cut)
    return groups_cut or any(cut.count(axis) > 1 for axis in along)


def _parts(
    weights: Sequence[DTensor], orders: Sequence[int], differentiate: bool, **options: Any
) -> list[tuple[list[int], _Exchanged | _Gathered]]:
    """``weights``, of one device and dtype, by how their terms are computed, each with the indices of its weights."""
    by_cut: dict[Any, list[int]] = defaultdict(list)
    whole = []
    for i, weight in enumerate(weights):
        check_placement(weight)
        if _needs_gathering(weight, orders, options["dim"], options["norm"]):
            whole.append(i)
        else:
            by_cut[weight.device_mesh, tuple(mesh_dim for mesh_dim, _ in _sharding(weight))].append(i)
    parts: list[tuple[list[int], _Exchanged | _Gathered]] = [
        (indices, _Exchanged([weights[i] for i in indices], orders, **options)) for indices in by_cut.values()
    ]
    if whole:
        gathered = [weights[i] for i in whole]
        parts.append(
            (whole, _Gathered(gathered, lambda w: functional.difference_terms([w], orders, **options), differentiate))
        )
    return parts


def _apply(part: _Exchanged | _Gathered, weights: Sequence[DTensor]) -> Tensor:
    return _Terms.apply(part, *(weight.to_local() for weight in weights))


def _placed_alike(one: DTensor, other: DTensor) -> bool:
    return one.placements == other.placements


def _wants_gradient(weights: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)


@_not_compiled
def difference_terms(weights: Sequence[DTensor], orders: Sequence[int], **options: Any) -> Tensor:
    """`smoothk.functional.difference_terms` of DTensors of one device and dtype."""
    parts = _parts(weights, orders, _wants_gradient(weights), **options)
    return total_of(_apply(part, [weights[i] for i in indices]) for indices, part in parts)


@_not_compiled
@torch.no_grad()
def accumulate_difference_penalty(
    weights: Sequence[DTensor], grads: Sequence[DTensor], coefficients: Tensor, orders: Sequence[int], **options: Any
) -> Tensor:
    """`smoothk.functional.accumulate_difference_penalty` of DTensors of one device and dtype.

    A gradient placed like its weight is added to in place; for any other one (a replicated weight's may be Partial) the
    penalty's gradient is redistributed.
    """
    pairs = list(zip(weights, grads, strict=True))
    local = [g.to_local() if _placed_alike(w, g) else torch.zeros_like(w.to_local(), dtype=g.dtype) for w, g in pairs]
    parts = _parts(weights, orders, True, **options)
    terms = total_of(part.accumulate([local[i] for i in indices], coefficients) for indices, part in parts)
    for (weight, grad), own in zip(pairs, local, strict=True):
        if not _placed_alike(weight, grad):
            _add_redistributed(grad, weight, own)
    return terms


def _add_redistributed(grad: DTensor, weight: DTensor, own: Tensor) -> None:
    """Add ``own``, placed as ``weight``, into ``grad``; of ranks whose gradients are summed the first adds it."""
    mesh = weight.device_mesh
    added = DTensor.from_local(
        own, mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    ).redistribute(placements=[Replicate() if p.is_partial() else p for p in grad.placements])
    if not any(p.is_partial() and mesh.get_local_rank(i) for i, p in enumerate(grad.placements)):
        grad.to_local().add_(added.to_local())


@_not_compiled
def gathered_terms(weights: Sequence[DTensor], evaluate: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum of ``evaluate(whole weight)``, a vector of terms, over DTensors; differentiable.

    For terms that need a weight whole. One weight at a time is gathered, evaluated on every rank and differentiated
    right away, so that only shards of gradients stay.
    """
    return _apply(_Gathered(weights, evaluate, _wants_gradient(weights)), weights)


@_not_compiled
def polar_factor(
    weight: DTensor, evaluate: Callable[[list[Tensor]], list[tuple[Tensor, Tensor]]]
) -> tuple[Tensor, DTensor]:
    """`smoothk.functional.polar_factors`, which is ``evaluate``, of one DTensor, gathered for it."""
    with torch.no_grad():
        whole = weight.full_tensor().detach()
    ((value, factor),) = evaluate([whole])
    own, mesh = _own_shard(factor, weight), weight.device_mesh
    return value, DTensor.from_local(
        own, mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )
