"""The ops as functions: check the arguments, choose a backend, run.

Every function takes ``backend=None`` (the fastest that can run these tensors) or a backend by name; one that cannot run
raises `smoothk.BackendUnavailable`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor

from . import backend as _backend
from . import ops, polar, reference
from .modes import without_autocast
from .unfolding import check_unfolding

if TYPE_CHECKING:  # slow to import
    from torch.distributed.tensor import DTensor

NORMS = ("l2", "l1", "l21", "huber")
_NAMESPACES = {"torch": ops.TORCH, "cpp": "smoothk", "triton": "smoothk_triton"}  # of the operators in `smoothk.ops`


def _as_list(weights: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if not isinstance(weights, Iterable):
        raise TypeError(f"weights must be a tensor or a sequence of tensors, got {type(weights).__name__}")
    tensors = [weights] if isinstance(weights, Tensor) else list(weights)
    for i, weight in enumerate(tensors):
        if not isinstance(weight, Tensor):
            raise TypeError(f"weights[{i}] must be a tensor, got {type(weight).__name__}")
        if not weight.is_floating_point():
            raise TypeError(f"weights[{i}] must have a real floating-point dtype, got {weight.dtype}")
        if weight.layout != torch.strided:
            raise TypeError(f"weights[{i}] must be a dense (strided) tensor, got layout {weight.layout}")
    return tensors


def check_dim(dim: int | Sequence[int]) -> tuple[int, ...]:
    """``dim`` as a tuple of distinct integers."""
    dims = tuple(dim) if isinstance(dim, Iterable) else (dim,)
    if any(not isinstance(d, int) or isinstance(d, bool) for d in dims):
        raise TypeError(f"dim must be an int or a tuple of ints, got {dim!r}")
    if not dims:
        raise ValueError("dim must name at least one axis, got ()")
    if len(set(dims)) != len(dims):
        raise ValueError(f"dim must not name an axis twice, got {dim!r}")
    return dims


def check_axes(dim: tuple[int, ...], axes: int, name: str) -> None:
    """Raise if two entries of ``dim`` are one of a weight's ``axes``, counted from both ends."""
    present = [d % axes for d in dim if -axes <= d < axes]
    if len(set(present)) != len(present):
        raise ValueError(f"dim must not name an axis twice, got {dim!r} for {name} with {axes} axes")


def check_difference_options(order: int, norm: str, eps: float) -> None:
    """Raise unless these describe a difference penalty."""
    if not isinstance(order, int) or isinstance(order, bool):
        raise TypeError(f"order must be an int, got {type(order).__name__}")
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(map(repr, NORMS))}, got {norm!r}")
    if not isinstance(eps, int | float):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be a positive finite number, got {eps!r}")


def check_nuclear_options(unfolding: str, method: str) -> None:
    """Raise unless these describe a nuclear norm."""
    check_unfolding(unfolding)
    if method not in polar.METHODS:
        names = ", ".join(map(repr, polar.METHODS))
        raise ValueError(f"method must be one of {names}, got {method!r}")


def nuclear_op(method: str) -> str:
    """The op, in `smoothk.backend`, that computes nuclear norms by ``method``."""
    return "polar_factors" if method == "polar" else "nuclear_norm"


def choose_backends(
    op: str, backend: str | None, tensors: Sequence[Tensor], grads: Sequence[Tensor | None] = ()
) -> list[tuple[list[int], str]]:
    """The groups of `_by_kind`, each with the name of the backend that runs ``op`` on it.

    ``grads`` are those that an op is to add into, one per tensor or none; a None stands for one that will be created.
    Raises whatever ``op`` would raise where ``backend`` cannot run these tensors, before anything is computed.
    """
    groups = []
    for indices in _by_kind(tensors, grads):
        group, into = [tensors[i] for i in indices], [grads[i] for i in indices] if grads else []
        present = [grad for grad in into if grad is not None]
        if is_dtensor(group[0]):
            from .distributed import check_placement

            for i in indices:
                check_placement(cast("DTensor", tensors[i]), grads[i] if grads else None)
            group, present = [local_part(tensor) for tensor in group], [local_part(grad) for grad in present]
        groups.append((indices, _backend.choose(op, backend, group, present)))
    return groups


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this is a DTensor; none is where their module, slow to import, has not been."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of ``tensor``."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def _by_kind(tensors: Sequence[Tensor], grads: Sequence[Tensor | None] = ()) -> list[list[int]]:
    """Indices of ``tensors`` in groups of one device, dtype and gradient dtype, DTensors apart from the others."""
    groups: dict[tuple[torch.device, torch.dtype, torch.dtype, bool], list[int]] = {}
    for i, tensor in enumerate(tensors):
        grad = grads[i] if grads else None
        into = tensor.dtype if grad is None else grad.dtype
        groups.setdefault((tensor.device, tensor.dtype, into, is_dtensor(tensor)), []).append(i)
    return list(groups.values())


def _sum_over_kinds(tensors: Sequence[Tensor], terms: int, values_of: Callable[[list[int]], Tensor]) -> Tensor:
    """Sum of ``values_of(indices)``, ``[terms]``, over the groups of `_by_kind`, on the first tensor's device."""
    groups = _by_kind(tensors)
    return _total(tensors, terms, groups, [values_of(indices) for indices in groups])


def _total(tensors: Sequence[Tensor], terms: int, groups: Sequence[Sequence[int]], values: Sequence[Tensor]) -> Tensor:
    """Sum of the groups' ``values``; a group's tensors have one dtype."""
    device = tensors[0].device if tensors else None
    dtype = reference.result_dtype(tensors[indices[0]] for indices in groups)
    values = [value.to(device=device, dtype=dtype) for value in values]
    return sum(values[1:], values[0]) if values else torch.zeros(terms, dtype=dtype, device=device)


def difference_penalty(
    weights: Tensor | Sequence[Tensor],
    order: int = 1,
    *,
    dim: int | Sequence[int] = 0,
    norm: str = "l2",
    normalized: bool = False,
    eps: float = 1e-8,
    backend: str | None = None,
) -> Tensor:
    """Penalty on the first or second finite differences of weights along their axes.

    With ``d[i] = W[i+1] - W[i]`` (order 1) or ``W[i+2] - 2 W[i+1] + W[i]`` (order 2) along an axis, the penalty is the
    sum over tensors and axes of

    - ``norm="l2"``: ``Σ d²``
    - ``norm="l1"``: ``Σ |d|`` (anisotropic total variation; subgradient 0 at 0)
    - ``norm="l21"``: ``Σ_i sqrt(Σ d[i]² + eps)``, one group per difference along the axis
    - ``norm="huber"``: ``Σ huber(d)`` with ``delta=1`` (`torch.nn.functional.huber_loss`)

    Rows are output channels for the default ``dim=0``. Source: the derivative penalties of Runkel et al., "Smooth Model
    Compression without Fine-Tuning" (arXiv 2505.24469); norm, boundary and scaling are not given there, the defaults
    are our reading.

    Args:
        weights: a tensor or a sequence of tensors of any shape, strides, device and floating dtype. Half precision is
            computed in float32. A tensor with at most ``order`` entries along an axis adds 0 for that axis. A DTensor
            counts as the whole weight, has no second derivative, and every rank has to make the call
            (`smoothk.distributed`).
        order: 1 or 2.
        dim: axis, or axes to sum over, of each tensor's own axes; an axis that a tensor lacks adds 0.
        norm: one of ``"l2"``, ``"l1"``, ``"l21"``, ``"huber"``.
        normalized: divide each tensor's penalty by ``‖W‖_F²`` (l2) or ``‖W‖_F`` (others), which makes it blind to the
            scale of the tensor (not for huber, which is not homogeneous). The gradient goes through the scale; a zero
            tensor adds 0 with gradient 0.
        eps: smoothing of ``"l21"``, in squared weight units.
        backend: ``None``, ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"``. ``"triton"`` is for CUDA tensors; not
            yet run on a GPU, it is taken only by its name.

    Returns:
        0-dim tensor on the first weight's device, float32, or float64 if any weight is. Zero for an empty sequence.

    Raises:
        TypeError: a weight is not a dense real floating-point tensor; order or dim is not made of ints.
        ValueError: unknown order or norm, non-positive eps, no axis or one named twice.
        BackendUnavailable: the backend asked for by name cannot run these tensors.
    """
    tensors = _as_list(weights)
    dims = check_dim(dim)
    for i, tensor in enumerate(tensors):
        check_axes(dims, tensor.dim(), f"weights[{i}]")
    check_difference_options(order, norm, eps)

    terms = difference_terms(tensors, [order], dim=dims, norm=norm, normalized=normalized, eps=eps, backend=backend)
    return terms[0]


def difference_terms(
    weights: Sequence[Tensor],
    orders: Sequence[int],
    *,
    dim: tuple[int, ...],
    norm: str,
    normalized: bool,
    eps: float = 1e-8,
    backend: str | None = None,
) -> Tensor:
    """`difference_penalty` of every order in ``orders`` (``[1]``, ``[2]`` or ``[1, 2]``), ``[len(orders)]``: one pass.

    Differentiable. Arguments are taken as checked.
    """

    options = {"dim": dim, "norm": norm, "normalized": normalized, "eps": eps}

    def values_of(indices: list[int]) -> Tensor:
        group = [weights[i] for i in indices]
        if is_dtensor(group[0]):
            from . import distributed

            return distributed.difference_terms(group, orders, **options, backend=backend)
        chosen = _backend.choose("difference_penalty", backend, group)
        if chosen != "torch":
            return getattr(torch.ops, _NAMESPACES[chosen]).difference_penalty(group, orders, dim, norm, normalized, eps)
        return reference.difference_terms(group, orders, **options)

    if not weights:  # a backend asked for by name must be there even if it has nothing to do
        _backend.choose("difference_penalty", backend, weights)
    return _sum_over_kinds(weights, len(orders), values_of)


def accumulate_difference_penalty(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    coefficients: Tensor,
    orders: Sequence[int],
    *,
    dim: tuple[int, ...],
    norm: str,
    normalized: bool,
    eps: float = 1e-8,
    backend: str | None = None,
    groups: Sequence[tuple[list[int], str]] | None = None,
) -> Tensor:
    """Add the gradient of ``Σ coefficients[k] * P_orders[k]`` into ``grads`` in place, without autograd.

    ``grads[i]`` has the shape and device of ``weights[i]``; ``coefficients`` is float64, ``[len(orders)]``. Arguments
    are taken as checked; ``groups`` is what `choose_backends` says of them, if it was asked before. Returns
    ``coefficients[k] * P_orders[k]``, ``[len(orders)]``, detached.
    """

    options = {"dim": dim, "norm": norm, "normalized": normalized, "eps": eps}

    def values_of(indices: list[int], chosen: str) -> Tensor:
        ws, gs = [weights[i] for i in indices], [grads[i] for i in indices]
        factors = coefficients.to(ws[0].device)
        if is_dtensor(ws[0]):
            from . import distributed

            return distributed.accumulate_difference_penalty(ws, gs, factors, orders, **options, backend=backend)
        if chosen != "torch":
            return accumulate_by_kernel(chosen, gs, ws, factors, orders, dim, norm, normalized, eps)
        return reference.total_of(_accumulate_one(w, g, factors) for w, g in zip(ws, gs, strict=True))

    def _accumulate_one(weight: Tensor, grad: Tensor, factors: Tensor) -> Tensor:
        with torch.enable_grad():
            w = weight.to(reference.compute_dtype(weight.dtype)).detach().requires_grad_()
            terms = reference.difference_terms([w], orders, **options)
        factors = factors.to(terms.dtype)
        grad.add_(torch.autograd.grad(terms, w, factors)[0])
        return factors * terms.detach()

    if groups is None:
        groups = choose_backends("difference_penalty", backend, weights, grads)
    values = [values_of(indices, chosen) for indices, chosen in groups]
    return _total(weights, len(orders), [indices for indices, _ in groups], values)


def accumulate_by_kernel(backend: str, grads: Sequence[Tensor], *arguments: Any) -> Tensor:
    """`accumulate_difference_penalty` of weights that one kernel takes, or refuses before it has written anything."""
    if not torch.compiler.is_compiling():  # autograd is to know that gradients are written to; no cache is cold yet
        torch.autograd.graph.increment_version([grad for grad in grads if not grad.is_inference()])
    return getattr(torch.ops, _NAMESPACES[backend]).difference_penalty_accumulate_.default(grads, *arguments)


def nuclear_norm(
    weights: Tensor | Sequence[Tensor],
    *,
    unfolding: str = "channel",
    method: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """Nuclear norm (sum of singular values) of weights seen as matrices.

    The gradient is the subgradient ``U Vᵀ`` over the singular values above rounding (``max(rows, columns) * eps *
    σ_max``) and 0 in the other directions; U and V are never differentiated, so repeated and zero singular values give
    finite gradients. Second derivatives are an error. Under the transforms of `torch.func` and in forward mode the norm
    is that of `torch.linalg.svdvals`, with its derivatives, over the same singular values. Source: Runkel et al., arXiv
    2505.24469 (nuclear norm of the flattened weight); the spatial unfolding is ours, after Jaderberg et al., arXiv
    1405.3866.

    Args:
        weights: a tensor ``[C_out, C_in/groups, *kernel]`` or ``[C_out, C_in]``, or a sequence of them, of any device
            and floating dtype. Half precision is computed in float32. A vector counts as one row. DTensors are gathered
            one at a time, and every rank has to make the call.
        unfolding: ``"channel"`` for ``[C_out, C_in·k_h·k_w]``, ``"spatial"`` for ``[C_out·k_w, C_in·k_h]`` (2-d
            kernels; the same as ``"channel"`` for all others).
        method: ``"svd"``; ``"gram"``, eigenvectors of the Gram matrix in float64 (as exact as float32 weights allow);
            ``"polar"``, a Newton-Schulz polar factor, which leaves singular values below about 1e-3 of the largest
            unresolved; ``"auto"``, the fastest with a value error of at most 1e-3 and a gradient error of at most 1e-2
            on any spectrum.
        backend: ``None``, ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"``. ``"triton"`` has the method ``"polar"``,
            not yet run on a GPU: it multiplies in three TF32 products, or in float16 where
            ``torch.backends.cuda.matmul.fp32_precision`` allows less than float32.

    Returns:
        0-dim tensor on the first weight's device, float32, or float64 if any weight is. Zero for an empty sequence.

    Raises:
        TypeError: a weight is not a dense real floating-point tensor.
        ValueError: unknown unfolding or method.
        BackendUnavailable: the backend asked for by name cannot run these tensors.
    """
    tensors = _as_list(weights)
    check_nuclear_options(unfolding, method)
    op = nuclear_op(method)
    _backend.choose(op, backend, ())  # one asked for by name must be there even if it has nothing to do

    def values_of(indices: list[int]) -> Tensor:
        group = [tensors[i] for i in indices]
        if is_dtensor(group[0]):
            from . import distributed

            one = partial(nuclear_norm, unfolding=unfolding, method=method, backend=backend)
            return distributed.gathered_terms(group, lambda weight: one(weight).view(1))
        namespace = _NAMESPACES[_backend.choose(op, backend, group)]
        with without_autocast(tensors):
            matrices = [_at_least_2d(weight) for weight in group]
            if _backend.in_transform():
                return reference.nuclear_norm_by_svd(matrices, unfolding=unfolding).view(1)
            return reference.nuclear_norm(matrices, unfolding=unfolding, method=method, namespace=namespace).view(1)

    return _sum_over_kinds(tensors, 1, values_of)[0]


def polar_factors(
    weights: Sequence[Tensor], *, unfolding: str, method: str, backend: str | None
) -> list[tuple[Tensor, Tensor]]:
    """``‖W‖_*`` and its gradient U Vᵀ, in at least float32, of every weight, detached.

    Arguments are taken as checked. Of a DTensor the factor is a DTensor placed alike.
    """
    results: dict[int, tuple[Tensor, Tensor]] = {}
    for indices in _by_kind(weights):
        group = [weights[i].detach() for i in indices]
        if is_dtensor(group[0]):
            from . import distributed

            one = partial(polar_factors, unfolding=unfolding, method=method, backend=backend)
            results |= {i: distributed.polar_factor(weights[i], one) for i in indices}
            continue
        namespace = _NAMESPACES[_backend.choose(nuclear_op(method), backend, group)]
        with without_autocast(group):
            matrices = [_at_least_2d(weight) for weight in group]
            values, factors = getattr(torch.ops, namespace).polar_factors(matrices, unfolding, method)
        for i, weight, value, factor in zip(indices, group, values, factors, strict=True):
            results[i] = value, factor.view_as(weight)
    return [results[i] for i in range(len(weights))]


def _at_least_2d(weight: Tensor) -> Tensor:
    return weight if weight.dim() > 1 else weight.reshape(1, -1)
