"""Every op of smoothk in plain PyTorch: the definition, the fallback and the baseline of the benchmarks.

Arguments are taken as checked (`smoothk.functional` does that). Half-precision weights are computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from . import polar
from .unfolding import fold, unfold


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every narrower float."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def result_dtype(weights: Iterable[Tensor]) -> torch.dtype:
    """dtype of a penalty over ``weights``: float64 if any of them is, else float32."""
    return torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32


def total_of(terms: Iterable[Tensor]) -> Tensor:
    """The sum of at least one tensor; that of none would be the int 0."""
    return cast(Tensor, sum(terms))


def axes_of(weight: Tensor, dim: Sequence[int], order: int) -> list[int]:
    """The entries of ``dim`` along which ``weight`` is long enough for a difference of ``order``."""
    rank = weight.dim()
    return [axis % rank for axis in dim if -rank <= axis < rank and weight.shape[axis] > order]


def _sum_of_norm(difference: Tensor, axis: int, norm: str, eps: float) -> Tensor:
    if norm == "l2":
        return difference.square().sum()
    if norm == "l1":
        return difference.abs().sum()
    if norm == "huber":
        return F.huber_loss(difference, torch.zeros_like(difference), reduction="sum", delta=1.0)
    groups = difference.square().movedim(axis, 0).flatten(1).sum(1) if difference.dim() > 1 else difference.square()
    return (groups + eps).sqrt().sum()


def difference_penalty(
    weights: Sequence[Tensor],
    order: int = 1,
    *,
    dim: Sequence[int] = (0,),
    norm: str = "l2",
    normalized: bool = False,
    eps: float = 1e-8,
) -> Tensor:
    """Sum over ``weights`` and ``dim`` of the norm of their ``order``-th differences; see
    `smoothk.difference_penalty`."""
    device = weights[0].device if weights else None
    total = torch.zeros((), dtype=result_dtype(weights), device=device)
    for weight in weights:
        axes = axes_of(weight, dim, order)
        if not axes:
            nothing = weight.reshape(-1)[:0].sum()  # 0 with a gradient of zeros
            total = total + nothing.to(device=total.device, dtype=total.dtype)
            continue
        w = weight.to(compute_dtype(weight.dtype))
        value = total_of(_sum_of_norm(torch.diff(w, n=order, dim=axis), axis, norm, eps) for axis in axes)
        if normalized:
            # The two terms of the gradient cancel in part: their factors are taken in float64, where there is one.
            wide = w.dtype if w.device.type == "mps" else torch.float64
            value, squares = value.to(wide), w.square().sum(dtype=wide)
            zero = squares == 0  # not `> 0`: a NaN has to come through
            scale = torch.where(zero, 1, squares)
            value = torch.where(zero, 0, value / (scale if norm == "l2" else scale.sqrt()))
        total = total + value.to(device=total.device, dtype=total.dtype)
    return total


def difference_terms(weights: Sequence[Tensor], orders: Sequence[int], **options: Any) -> Tensor:
    """`difference_penalty` of every order, ``[len(orders)]``."""
    return torch.stack([difference_penalty(weights, order, **options) for order in orders])


def polar_factors(weights: Sequence[Tensor], unfolding: str, method: str) -> tuple[Tensor, list[Tensor]]:
    """``‖W‖_*`` ``[len(weights)]`` and U Vᵀ of every unfolded weight, detached, in at least float32; the factors have
    their weights' shapes."""
    matrices = [w.detach().to(compute_dtype(w.dtype)) for w in weights]
    solved = iter(polar.polar_factors([unfold(w, unfolding)[0] for w in matrices if w.numel()], method))
    values, factors = [], []
    for w in matrices:
        value, factor = next(solved) if w.numel() else (w.new_zeros(()), w.new_zeros(w.shape))
        values.append(value.to(device=matrices[0].device, dtype=result_dtype(weights)))
        factors.append(fold(factor.unsqueeze(0), w.shape, unfolding).contiguous() if w.numel() else factor)
    return torch.stack(values), factors


def nuclear_norm(
    weights: Sequence[Tensor], *, unfolding: str = "channel", method: str = "auto", namespace: str
) -> Tensor:
    """Sum of the singular values of the unfolded ``weights`` by the operator ``polar_factors`` of ``namespace`` (see
    `smoothk.ops`); see `smoothk.nuclear_norm`."""
    values, _ = getattr(torch.ops, namespace).polar_factors(weights, unfolding, method)
    return values.sum()


def nuclear_norm_by_svd(weights: Sequence[Tensor], *, unfolding: str) -> Tensor:
    """The same by `torch.linalg.svdvals`, over singular values above rounding: for transforms and forward mode, which
    the operator does not know."""
    terms = []
    for weight in weights:
        if not weight.numel():
            terms.append(weight.sum().to(compute_dtype(weight.dtype)))
            continue
        matrix = unfold(weight, unfolding)[0].to(compute_dtype(weight.dtype))
        s = torch.linalg.svdvals(matrix)
        resolved = s > max(matrix.shape) * torch.finfo(s.dtype).eps * s[:1]
        terms.append(torch.where(resolved, s, 0).sum())
    return total_of(terms)


_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def low_rank_conv(
    input: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
    scheme: str,
) -> Tensor:
    """``u * (v * input) + bias`` as two library convolutions; see `smoothk.low_rank_conv2d`. Factors without spatial
    axes are those of a linear map."""
    if v.dim() == 2:
        return F.linear(F.linear(input, v), u, bias)
    conv = _CONV[v.dim() - 2]
    if scheme == "channel":
        return conv(conv(input, v, None, stride, padding, dilation, groups), u, bias, groups=groups)
    pad_h, pad_w = (padding, padding) if isinstance(padding, str) else ((padding[0], 0), (0, padding[1]))
    z = conv(input, v, None, (stride[0], 1), pad_h, (dilation[0], 1), groups)
    return conv(z, u, bias, (1, stride[1]), pad_w, (1, dilation[1]), groups)


def merged_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """The same as one library convolution with `merged_weight`."""
    if weight.dim() == 2:
        return F.linear(input, weight, bias)
    return _CONV[weight.dim() - 2](input, weight, bias, stride, padding, dilation, groups)


def merged_weight(v: Tensor, u: Tensor, groups: int, scheme: str) -> Tensor:
    """The dense weight ``[C_out, C_in/groups, *kernel]``, the product of the factors; differentiable."""
    rank = u.shape[1]
    left = u.reshape(groups, -1, rank)
    shape = (u.shape[0], *v.shape[1:])
    if scheme == "spatial":
        left = u.reshape(groups, -1, rank, u.shape[3]).transpose(2, 3).reshape(groups, -1, rank)
        shape = (u.shape[0], v.shape[1], v.shape[2], u.shape[3])
    return fold(left @ v.reshape(groups, rank, -1), shape, scheme)
