"""Nuclear norm and polar factor of matrices: ``W = U S Vᵀ`` gives ``Σ S`` and its subgradient ``U Vᵀ``.

`METHODS` names the ways to compute them. ``"auto"`` is the fastest whose value is within 1e-3 and whose gradient within
1e-2 (relative, Frobenius) of the exact ones, on any spectrum: for float32 matrices on the CPU eigenvectors of Gram
matrices, in float32 as far as it resolves them (`_deflate`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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
SAFETY = 1.01  # keeps rounding from pushing a singular value past the interval in which a quintic contracts
QUINTICS = tuple((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in _POLAR_EXPRESS[:-2]) + _POLAR_EXPRESS[-2:]

# A float32 Gram matrix has errors of a few eps * σ_max², which turn the direction of σ by some eps * (σ_max / σ)². Down
# to this σ / σ_max that is less than 1e-2, and about 1e-3 measured.
_RESOLVED = 1e-2
_SMALL = 40_000  # entries up to which float64 is as fast


def polar_factors(matrices: Sequence[Tensor], method: str) -> list[tuple[Tensor, Tensor]]:
    """``(‖W‖_*, U Vᵀ)`` of every non-empty float32 or float64 matrix, by one of `METHODS`.

    ``U Vᵀ`` runs over the singular values above ``max(rows, columns) * eps * σ_max``, but for ``"polar"``, which has no
    such threshold. A matrix with a NaN or Inf gives NaN everywhere.
    """
    if method == "polar":
        return _polar_newton_schulz(matrices)
    return [_polar_factor(matrix, method) for matrix in matrices]


def _polar_factor(matrix: Tensor, method: str) -> tuple[Tensor, Tensor]:
    low, high = matrix.aminmax()  # makes no copy, and tells NaN
    largest = max(-low.item(), high.item())
    if not math.isfinite(largest):  # the solvers raise; a penalty propagates
        return matrix.new_full((), torch.nan), torch.full_like(matrix, torch.nan)
    if method == "auto":
        method = "svd" if matrix.dtype == torch.float64 else "mixed" if _exact_float32(matrix) else "gram"
    if method == "svd":
        return _polar_svd(matrix)
    wide = matrix.shape[0] <= matrix.shape[1]
    scaled = matrix if wide else matrix.mT.contiguous()
    scale = 1.0
    # A power of two changes no bit of the entries and brings their squares and 1 / σ in range.
    if largest > 0 and not 1e-6 < largest < 1e6:
        scale = 2.0 ** -max(math.frexp(largest)[1], -120)
        scaled = scaled * scale
    value, factor = _polar_mixed(scaled) if method == "mixed" and largest > 0 else _polar_gram(scaled)
    return matrix.new_tensor(value / scale), factor if wide else factor.mT


def _threshold(matrix: Tensor) -> float:
    """Share of σ_max that rounding of ``matrix`` can make out of nothing."""
    return max(matrix.shape) * torch.finfo(matrix.dtype).eps


def _polar_svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    resolved = s > _threshold(matrix) * s[:1]
    return s.sum(), (u * resolved) @ vh


def _polar_gram(matrix: Tensor) -> tuple[float, Tensor]:
    """Eigenvectors of the Gram matrix; in float64, whose squared condition number float32 input never fills."""
    squares, q = torch.linalg.eigh(_gram(matrix.double()))
    s = squares.clamp_min(0).sqrt()
    threshold = max(_threshold(matrix), math.sqrt(_threshold(squares)))  # the second is of float64 input
    inverse = torch.where(s > threshold * s[-1:], 1 / s, 0)
    root = (q * inverse) @ q.mT
    if matrix.numel() <= _SMALL:  # exact also next to the threshold, where the entries of `root` are large
        return s.sum().item(), (root @ matrix.double()).to(matrix.dtype)
    return s.sum().item(), _product(root.to(matrix.dtype), matrix.mT)


def _polar_mixed(matrix: Tensor) -> tuple[float, Tensor]:
    """`_polar_gram` of a float32 matrix, not 0, with as much in float32 as stays within the error of ``"auto"``."""
    found = _deflate(matrix) if matrix.numel() > _SMALL else None
    return _polar_gram(matrix) if found is None else found


def _deflate(w: Tensor) -> tuple[float, Tensor] | None:
    """``‖w‖_*``, and ``U Vᵀ`` over the singular values above ``columns * eps * σ_max``.

    ``U Vᵀ = left @ right``: in a basis of eigenvectors of the float32 Gram matrix the rows of ``w`` are orthogonal, and
    ``left`` is that basis over their lengths. This holds as far down as float32 resolves them. The first ``count`` rows
    are below; they are freed of what rounding has left in them of the others and treated in the same way: their Gram
    matrix has errors of their own, smaller, scale.

    Args:
        w: float32 ``[rows, columns]``, rows <= columns, largest entry about 1.

    Returns:
        None where a singular value is too close to the threshold to tell its side. Not even float64 recovers that from
        rows that were rounded: the caller has to start from the exact matrix.
    """
    left, right, count = None, w, len(w)
    value = cut = noise = 0.0
    while True:
        rows = right[:count]
        found = _eigenvectors(rows, cut, noise)
        if found is None:
            return None
        s, u, weak = found
        if left is None:
            largest = s[-1].item()
            cut, noise = _threshold(w) * largest, torch.finfo(w.dtype).eps * largest
        value += s[weak:].sum().item()
        lengths = s.float()
        if weak:
            rows = _product(u.mT, rows.mT)
            strong = rows[weak:]
            overlap = _product(rows[:weak], strong) / lengths[weak:].square()
            rows[:weak] -= _product(overlap, strong.mT)
            u[:, weak:] /= lengths[weak:]
        else:  # shorter than to turn the rows into the basis
            u = _product(u * torch.where(s > cut, 1 / lengths, 0), u)
        if left is None:
            left, right = u, rows
        else:
            left[:, :count] = _product(left[:, :count], u.mT)
            if weak:
                right[:count] = rows
        if not weak:
            return value, _product(left, right.mT)

        count = weak
        # The sum of the singular values left is between the Frobenius norm and √count times as much. Where that norm is
        # below the threshold and the sum a small part of the value, the middle is near enough.
        norm = torch.linalg.vector_norm(right[:count]).item()
        most = math.sqrt(count) * norm
        if norm < cut - noise and most < 1e-3 * value:
            return value + (norm + most) / 2, _product(left[:, count:], right[count:].mT)


def _eigenvectors(w: Tensor, cut: float, noise: float) -> tuple[Tensor, Tensor, int] | None:
    """Singular values in ascending order, float64, with left singular vectors, of which the first ones, as many as the
    last number says, are not resolved; None where it is open on which side of ``cut`` one lies.

    Args:
        cut: the threshold, or 0 for that of `_threshold`.
        noise: bound on the error of the singular values that comes with ``w``.
    """
    dtypes: tuple[torch.dtype, ...] = torch.float32, torch.float64
    if cut:  # rows that were rounded before: with many, float64 costs as much as a new start and seldom settles more
        dtypes = (torch.float32,) if len(w) > 128 else (torch.float64,)
    for dtype in dtypes:
        squares, u = torch.linalg.eigh(_gram(w.to(dtype)))
        s = squares.double().clamp_min(0).sqrt()
        largest = s[-1].item()
        threshold = cut or _threshold(w) * largest
        resolved = _RESOLVED * largest if dtype == torch.float32 else 0.0
        weak = int((s < resolved).sum()) if resolved > threshold else 0
        # The squares are wrong by less than 4 eps * σ_max², measured, so their roots at the cut by half that over it.
        slack = 2 * torch.finfo(dtype).eps * largest**2 / threshold + noise
        if not ((s[weak:] - threshold).abs() <= slack).any():
            return s, u.float(), weak
    return None


def _polar_newton_schulz(matrices: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Newton-Schulz iterations, batched over matrices of one shape, without a look at any number on the host."""
    groups: dict[tuple[int | torch.dtype | torch.device, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        groups.setdefault((*sorted(matrix.shape), matrix.dtype, matrix.device), []).append(i)
    results: dict[int, tuple[Tensor, Tensor]] = {}
    for indices in groups.values():
        transposed = [matrices[i].shape[0] > matrices[i].shape[1] for i in indices]
        batch = torch.stack([matrices[i].mT if t else matrices[i] for i, t in zip(indices, transposed, strict=True)])
        values, factors = map(torch.unbind_copy, newton_schulz(batch))
        # torch's stub has unbind_copy return None
        for i, t, value, factor in zip(indices, transposed, values, factors, strict=True):  # type: ignore[call-overload]
            results[i] = value, factor.mT if t else factor
    return [results[i] for i in range(len(matrices))]


def newton_schulz(batch: Tensor) -> tuple[Tensor, Tensor]:
    """``<W, X>`` ``[N]`` and the polar factors X of a batch of W ``[N, rows, columns]``, rows <= columns."""
    largest = batch.abs().amax((-2, -1), keepdim=True)  # squares of extreme entries would leave float32's range
    scaled = batch / torch.where(largest == 0, 1, largest)
    # The Frobenius norm bounds the largest singular value; a zero matrix stays zero.
    norm = torch.linalg.matrix_norm(scaled, keepdim=True)
    x = scaled / torch.where(norm == 0, 1, norm * SAFETY)
    for a, b, c in QUINTICS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (scaled * x).sum((-2, -1)) * largest[:, 0, 0], x


def _gram(w: Tensor) -> Tensor:
    """``w wᵀ``; for large matrices only the lower triangle of blocks, which is all that eigh reads, the rest is 0."""
    rows = len(w)
    block = -(-rows // 4) if rows >= 512 else rows
    gram = w.new_zeros(rows, rows)
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        gram[start:stop, :stop] = _product(w[start:stop], w[:stop])
    return gram


# torch sends float32 products to its BLAS library; oneDNN's are over twice as fast where that is MKL on an AMD CPU, and
# as fast elsewhere. This operator is how torch.compile reaches them.
_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ bᵀ``."""
    large = a.numel() * len(b) >= 1 << 20
    if large and _LINEAR is not None and a.dtype == torch.float32 and a.device.type == "cpu":
        return _LINEAR(a, b, None, "none", [], "")
    return a @ b.mT


def _exact_float32(matrix: Tensor) -> bool:
    """Whether float32 products here are made of float32 operations, not of TF32 or bfloat16 ones."""
    mkldnn: Any = torch.backends.mkldnn  # which puts an object in the module's place
    return matrix.device.type == "cpu" and mkldnn.matmul.fp32_precision in ("none", "ieee")


METHODS = ("auto", "svd", "gram", "polar")
