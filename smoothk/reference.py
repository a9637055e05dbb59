"""Every op of smoothk in plain PyTorch: the definition, the fallback and the baseline of the benchmarks.

Arguments are taken as checked (`smoothk.functional` does that). Half-precision weights are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .unfolding import fold, unfold

# Odd quintics a*x + b*x^3 + c*x^5 that drive all singular values of [1e-3, 1] to 1: Amsel et al., "The Polar Express"
# (arXiv 2505.16932), Algorithm 1. The last row is the classic Newton-Schulz quintic and is repeated to converge.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.875, -1.25, 0.375),
    (1.875, -1.25, 0.375),
)
_SAFETY = 1.01  # keeps rounding from pushing a singular value past the interval in which a quintic contracts


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every narrower float."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def result_dtype(weights: Sequence[Tensor]) -> torch.dtype:
    """dtype of a penalty over ``weights``: float64 if any of them is, else float32."""
    return torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32


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
        value = sum(_sum_of_norm(torch.diff(w, n=order, dim=axis), axis, norm, eps) for axis in axes)
        if normalized:
            squares = w.square().sum()
            zero = squares == 0  # not `> 0`: a NaN has to come through
            scale = torch.where(zero, 1, squares)
            value = torch.where(zero, 0, value / (scale if norm == "l2" else scale.sqrt()))
        total = total + value.to(device=total.device, dtype=total.dtype)
    return total


def difference_terms(weights: Sequence[Tensor], orders: Sequence[int], **options: Any) -> Tensor:
    """`difference_penalty` of every order, ``[len(orders)]``."""
    return torch.stack([difference_penalty(weights, order, **options) for order in orders])


def _polar_svd(matrix: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    resolved = s > max(matrix.shape[-2:]) * eps * s[..., :1]
    return s.sum(), (u * resolved.unsqueeze(-2)) @ vh


def _polar_gram(matrix: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the smaller Gram matrix; in float64, whose squared condition number float32 input never fills."""
    if matrix.shape[-2] > matrix.shape[-1]:
        value, factor = _polar_gram(matrix.mT, eps)
        return value, factor.mT
    m = matrix.double()
    squared, q = torch.linalg.eigh(m @ m.mT)
    s = squared.clamp_min(0).sqrt()
    resolved = s > max(matrix.shape[-2:]) * eps * s[..., -1:]
    inverse = torch.where(resolved, 1 / s, 0)
    root = (q * inverse.unsqueeze(-2)) @ q.mT
    return s.sum().to(matrix.dtype), root.to(matrix.dtype) @ matrix


def _polar_newton_schulz(matrix: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if matrix.shape[-2] > matrix.shape[-1]:
        value, factor = _polar_newton_schulz(matrix.mT, eps)
        return value, factor.mT
    largest = matrix.abs().amax()  # squares of very large or small entries would leave float32's range
    scaled = matrix / torch.where(largest == 0, 1, largest)
    # The Frobenius norm bounds the largest singular value; a zero matrix stays zero.
    norm = torch.linalg.matrix_norm(scaled, keepdim=True)
    x = scaled / torch.where(norm == 0, 1, norm * _SAFETY)
    for step, (a, b, c) in enumerate(_POLAR_EXPRESS):
        if step < len(_POLAR_EXPRESS) - 2:
            a, b, c = a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (scaled * x).sum() * largest, x


_POLAR: dict[str, Callable[[Tensor, float], tuple[Tensor, Tensor]]] = {
    "svd": _polar_svd,
    "gram": _polar_gram,
    "polar": _polar_newton_schulz,
}
NUCLEAR_METHODS = ("auto", *_POLAR)


def polar_factor(weight: Tensor, unfolding: str, method: str) -> tuple[Tensor, Tensor]:
    """``(‖W‖_*, U Vᵀ)`` of one weight; the factor has the weight's shape, both have at least float32."""
    w = weight.detach().to(compute_dtype(weight.dtype))
    if w.numel() == 0:
        return w.new_zeros(()), torch.zeros_like(w)
    matrix = unfold(w, unfolding)
    if method == "auto":  # the Gram matrix resolves float32 singular values only when formed in a wider type
        method = "svd" if matrix.dtype == torch.float64 else "gram"
    if not torch.isfinite(matrix).all():  # the solvers raise; a penalty propagates
        return w.new_full((), torch.nan), torch.full_like(w, torch.nan)
    value, factor = _POLAR[method](matrix, torch.finfo(matrix.dtype).eps)
    return value, fold(factor, weight.shape, unfolding)


class _NuclearNorm(torch.autograd.Function):
    """‖W‖_* with the subgradient U Vᵀ. Nothing differentiates U or V, so repeated singular values are harmless."""

    @staticmethod
    def forward(ctx, weight: Tensor, unfolding: str, method: str) -> Tensor:
        value, factor = polar_factor(weight, unfolding, method)
        ctx.save_for_backward(weight, factor.to(weight.dtype))
        return value

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _NuclearNormBackward.apply(grad, *ctx.saved_tensors), None, None


class _NuclearNormBackward(torch.autograd.Function):
    """``grad · U Vᵀ``, tied to the weight so that a second derivative is an error and not silently zero."""

    @staticmethod
    def forward(ctx, grad: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
        return (grad * factor).to(factor.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise RuntimeError("nuclear_norm has no second derivative: the singular vectors are not differentiated")


def nuclear_norm(weights: Sequence[Tensor], *, unfolding: str = "channel", method: str = "auto") -> Tensor:
    """Sum of the singular values of the unfolded ``weights``; see `smoothk.nuclear_norm`."""
    device = weights[0].device if weights else None
    total = torch.zeros((), dtype=result_dtype(weights), device=device)
    for weight in weights:
        value = _NuclearNorm.apply(weight, unfolding, method)
        total = total + value.to(device=total.device, dtype=total.dtype)
    return total


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
    """``u * (v * input) + bias`` as two library convolutions; see `smoothk.low_rank_conv2d`."""
    conv = _CONV[v.dim() - 2]
    if scheme == "channel":
        return conv(conv(input, v, None, stride, padding, dilation, groups), u, bias, groups=groups)
    pad_h, pad_w = (padding, padding) if isinstance(padding, str) else ((padding[0], 0), (0, padding[1]))
    z = conv(input, v, None, (stride[0], 1), pad_h, (dilation[0], 1), groups)
    return conv(z, u, bias, (1, stride[1]), pad_w, (1, dilation[1]), groups)
