"""Truncated SVD of weights, by eigenvectors of the smaller Gram matrix in float64.

That is several times faster than a float32 SVD and, for weights of at most float32, as exact: squaring the condition
number costs less than the wider type gives. The factors are a projection onto eigenvectors, so that a full-rank product
is the weight to rounding whatever the singular values are.
"""

from __future__ import annotations

import math
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


def check_rank(rank: int, shape: Sequence[int], groups: int = 1, scheme: str = "channel") -> int:
    """``rank`` if it is one of the weight's, else TypeError or ValueError."""
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"rank must be an int, got {type(rank).__name__}")
    rows, columns = matrix_shape(shape, scheme, groups)
    largest = min(rows, columns)
    if not 1 <= rank <= largest:
        raise ValueError(f"rank must be between 1 and {largest} for a {rows}x{columns} weight, got {rank}")
    return rank


def choose_rank(
    weight: Tensor, rank: int | None, energy: float | None, keep: float | None, groups: int, scheme: str
) -> int:
    """The rank that exactly one of ``rank``, ``energy`` and ``keep`` asks for."""
    given = {name: v for name, v in (("rank", rank), ("energy", energy), ("keep", keep)) if v is not None}
    if len(given) != 1:
        raise TypeError(f"exactly one of rank, energy and keep must be given, got {', '.join(given) or 'none'}")
    if rank is not None:
        return check_rank(rank, weight.shape, groups, scheme)
    (name, share), *_ = given.items()
    if not isinstance(share, int | float) or isinstance(share, bool):
        raise TypeError(f"{name} must be a number, got {type(share).__name__}")
    if not 0 < share <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {share}")
    if energy is not None:
        return rank_for_energy(squared_singular_values(weight, groups, scheme), energy)
    per_rank = parameters_per_rank(weight.shape, groups, scheme)
    affordable = math.floor(share * weight.numel() / per_rank + 1e-9)  # 0.29 * 100 is a rounding error below 29
    if affordable < 1:
        smallest = math.ceil(1e6 * per_rank / weight.numel()) / 1e6
        raise ValueError(f"keep must be at least {smallest:.6f} for rank 1 of this weight, got {share}")
    return min(affordable, full_rank(weight.shape, groups, scheme))


def _scaled_matrices(weight: Tensor, groups: int, scheme: str) -> tuple[Tensor, Tensor]:
    """The weight's matrices over its largest entry, and that entry: squares of float64 could leave their range."""
    w = weight.detach().double()
    largest = w.abs().amax()
    scale = torch.where(largest == 0, 1, largest)
    return unfold(w / scale, scheme, groups), scale


def _smaller_gram(matrices: Tensor) -> Tensor:
    return matrices.mT @ matrices if matrices.shape[-2] > matrices.shape[-1] else matrices @ matrices.mT
