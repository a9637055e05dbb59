"""Truncated SVD of weights, by eigenvectors of the smaller Gram matrix in float64.

That is several times faster than a float32 SVD and, for weights of at most float32, as exact: squaring the condition
number costs less than the wider type gives. The factors are a projection onto eigenvectors, so that a full-rank product
is the weight to rounding whatever the singular values are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .unfolding import matrix_shape, unfold


def full_rank(shape: Sequence[int], groups: int = 1, scheme: str = "channel") -> int:
    """Largest useful rank (per group) of a weight ``[C_out, C_in/groups, *kernel]``."""
    return min(matrix_shape(shape, scheme, groups))


def parameters_per_rank(shape: Sequence[int], groups: int = 1, scheme: str = "channel") -> int:
    """Parameters that one unit of rank costs, over all groups."""
    return groups * sum(matrix_shape(shape, scheme, groups))


def squared_singular_values(weight: Tensor, groups: int = 1, scheme: str = "channel") -> Tensor:
    """σ² of the unfolded weight in units of its largest entry squared, ``[groups, full_rank]``, descending, float64."""
    m, _ = _scaled_matrices(weight, groups, scheme)
    return torch.linalg.eigvalsh(_smaller_gram(m)).clamp_min(0).flip(-1)


def truncated_factors(weight: Tensor, rank: int, groups: int = 1, scheme: str = "channel") -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of the unfolded weight (Eckart & Young, 1936), ``sqrt(σ)`` in each.

    Returns:
        ``u [groups, rows, rank]`` and ``v [groups, rank, columns]``, float64.
    """
    m, scale = _scaled_matrices(weight, groups, scheme)
    squares, q = torch.linalg.eigh(_smaller_gram(m))
    squares, q = squares.flip(-1)[:, :rank], q.flip(-1)[..., :rank]
    # Where σ is lost in rounding any scale serves, as long as neither factor overflows: it cancels in the product.
    limits = torch.finfo(squares.dtype)
    root = squares.clamp_min(0).maximum(limits.eps * squares[:, :1]).clamp_min(limits.tiny).pow(0.25).unsqueeze(-2)
    if m.shape[-2] > m.shape[-1]:
        u, v = m @ q / root, (q * root).mT
    else:
        u, v = q * root, (m.mT @ q / root).mT
    return u * scale.sqrt(), v * scale.sqrt()


def rank_for_energy(squares: Tensor, energy: float) -> int:
    """Smallest rank whose share of ``Σσ²`` reaches ``energy``; ``squares`` ``[groups, full_rank]`` holds the σ²."""
    kept = squares.sum(0).cumsum(0)
    # 1e-12 of slack: energy=1.0 must not ask for more than the last partial sum, which has rounding of its own.
    return min(int((kept < (energy - 1e-12) * kept[-1]).sum()) + 1, len(kept))


def _scaled_matrices(weight: Tensor, groups: int, scheme: str) -> tuple[Tensor, Tensor]:
    """The weight's matrices over its largest entry, and that entry: squares of float64 could leave their range."""
    w = weight.detach().double()
    largest = w.abs().amax()
    scale = torch.where(largest == 0, 1, largest)
    return unfold(w / scale, scheme, groups), scale


def _smaller_gram(matrices: Tensor) -> Tensor:
    return matrices.mT @ matrices if matrices.shape[-2] > matrices.shape[-1] else matrices @ matrices.mT
