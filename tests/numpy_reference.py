"""The ops from their definitions, in NumPy float64 and plain loops. Nothing here calls torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np

STENCILS = {1: (-1.0, 1.0), 2: (1.0, -2.0, 1.0)}


def _value_and_slope(d: np.ndarray, norm: str, eps: float) -> tuple[float, np.ndarray]:
    """A norm of one difference ``d`` (all entries that share an index along the axis) and its gradient."""
    if norm == "l2":
        return float(np.sum(d * d)), 2 * d
    if norm == "l1":
        return float(np.sum(np.abs(d))), np.sign(d)
    if norm == "l21":
        length = math.sqrt(np.sum(d * d) + eps)
        return length, d / length
    inside = np.abs(d) <= 1
    return float(np.sum(np.where(inside, d * d / 2, np.abs(d) - 0.5))), np.where(inside, d, np.sign(d))


def difference_penalty(
    weights: Sequence[np.ndarray],
    order: int = 1,
    dim: Sequence[int] = (0,),
    norm: str = "l2",
    normalized: bool = False,
    eps: float = 1e-8,
) -> tuple[float, list[np.ndarray]]:
    """Value of the penalty and its gradient by every weight."""
    total, gradients = 0.0, []
    for weight in weights:
        w = np.asarray(weight, dtype=np.float64)
        value, gradient = 0.0, np.zeros_like(w)
        for axis in dim:
            if not -w.ndim <= axis < w.ndim:
                continue
            rows, slopes = np.moveaxis(w, axis, 0), np.moveaxis(gradient, axis, 0)
            for i in range(len(rows) - order):
                d = sum(c * rows[i + k] for k, c in enumerate(STENCILS[order]))
                part, slope = _value_and_slope(np.asarray(d), norm, eps)
                value += part
                for k, c in enumerate(STENCILS[order]):
                    slopes[i + k] += c * slope  # a view of `gradient`
        if normalized:
            value, gradient = _normalize(value, gradient, w, 1 if norm == "l2" else 0.5)
        total += value
        gradients.append(gradient)
    return total, gradients


def _normalize(value: float, gradient: np.ndarray, w: np.ndarray, power: float) -> tuple[float, np.ndarray]:
    """``value / (Σ w²)^power`` by the quotient rule; a zero weight gives zeros."""
    squares = float(np.sum(w * w))
    if squares == 0:
        return 0.0, np.zeros_like(w)
    scale = squares**power
    return value / scale, gradient / scale - value * power * squares ** (-power - 1) * 2 * w


def unfold(weight: np.ndarray, unfolding: str) -> np.ndarray:
    """Matrix of a weight ``[C_out, C_in, *kernel]``, entry by entry."""
    w = np.asarray(weight, dtype=np.float64)
    c_out, c_in, kernel = w.shape[0], w.shape[1], w.shape[2:]
    if unfolding == "spatial" and len(kernel) == 2:
        k_h, k_w = kernel
        matrix = np.zeros((c_out * k_w, c_in * k_h))
        for o, c, i, j in product(range(c_out), range(c_in), range(k_h), range(k_w)):
            matrix[o * k_w + j, c * k_h + i] = w[o, c, i, j]
        return matrix
    matrix = np.zeros((c_out, c_in * math.prod(kernel)))
    for o in range(c_out):
        for column, index in enumerate(product(range(c_in), *map(range, kernel))):
            matrix[o, column] = w[(o, *index)]
    return matrix


def fold(matrix: np.ndarray, shape: Sequence[int], unfolding: str) -> np.ndarray:
    """Inverse of `unfold`."""
    positions = unfold(np.arange(math.prod(shape)).reshape(shape), unfolding).astype(int)
    weight = np.zeros(math.prod(shape))
    weight[positions] = matrix
    return weight.reshape(shape)


def nuclear_norm(weight: np.ndarray, unfolding: str = "channel", eps: float = 0.0) -> tuple[float, np.ndarray]:
    """Sum of the singular values, and ``U Vᵀ`` over those above ``max(rows, columns) * eps * σ_max``."""
    matrix = unfold(weight, unfolding)
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    resolved = s > max(matrix.shape) * eps * s[0]
    return float(s.sum()), fold((u * resolved) @ vt, np.shape(weight), unfolding)


def product_weight(v: np.ndarray, u: np.ndarray, groups: int = 1, scheme: str = "channel") -> np.ndarray:
    """Dense weight ``[C_out, C_in/groups, *kernel]`` of the factors."""
    c_out, rank = u.shape[:2]
    kernel = (v.shape[2], u.shape[3]) if scheme == "spatial" else v.shape[2:]
    weight = np.zeros((c_out, v.shape[1], *kernel))
    for o, r in product(range(c_out), range(rank)):
        row = v[o // (c_out // groups) * rank + r]  # [C_in/groups, *kernel of v]
        weight[o] += row * u[o, r, 0] if scheme == "spatial" else row * u[(o, r, *(0,) * len(kernel))]
    return weight


def convolution(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
) -> np.ndarray:
    """Cross-correlation ``[N, C_in, *size]`` to ``[N, C_out, *size_out]``; ``"same"`` pads the odd one at the end."""
    kernel, c_out, c_in = weight.shape[2:], weight.shape[0], weight.shape[1]
    if padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [(span // 2, span - span // 2) for span in spans]
    else:
        pads = [(p, p) for p in ([0] * len(kernel) if padding == "valid" else padding)]
    x = np.pad(x, [(0, 0), (0, 0), *pads])
    size = [
        (length - d * (k - 1) - 1) // s + 1
        for length, d, k, s in zip(x.shape[2:], dilation, kernel, stride, strict=True)
    ]
    y = np.zeros((x.shape[0], c_out, *size))
    for n, o, position in product(range(x.shape[0]), range(c_out), product(*map(range, size))):
        first = o // (c_out // groups) * c_in
        total = 0.0 if bias is None else bias[o]
        for tap in product(*map(range, kernel)):
            at = tuple(p * s + t * d for p, s, t, d in zip(position, stride, tap, dilation, strict=True))
            for c in range(c_in):
                total += weight[(o, c, *tap)] * x[(n, first + c, *at)]
        y[(n, o, *position)] = total
    return y
