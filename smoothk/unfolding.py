"""The two matrix views of a layer's weight, and the way back.

A weight ``[C_out, C_in/groups, *kernel]`` becomes one matrix per group:

- ``"channel"``: ``[C_out/groups, C_in/groups * prod(kernel)]``, rows are output channels (Runkel et al., arXiv
  2505.24469);
- ``"spatial"``: ``[C_out/groups * k_w, C_in/groups * k_h]`` (Jaderberg et al., arXiv 1405.3866), for 2-d kernels. For
  every other weight the name stands for the same matrix as ``"channel"``.

A rank-r factorisation of the first is a k_h x k_w convolution to r channels and a 1x1 one; of the second, a k_h x 1 and
a 1 x k_w convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

UNFOLDINGS = ("channel", "spatial")


def check_unfolding(value: object, argument: str = "unfolding") -> None:
    """Raise ValueError unless ``value`` is the name of an unfolding."""
    if value not in UNFOLDINGS:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, UNFOLDINGS))}, got {value!r}")


def unfold(weight: Tensor, unfolding: str = "channel", groups: int = 1) -> Tensor:
    """Matrices ``[groups, rows, columns]`` of ``weight`` ``[C_out, C_in/groups, *kernel]``; a view where strides
    allow."""
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    if unfolding == "spatial" and weight.dim() == 4:
        k_h, k_w = weight.shape[2:]
        return grouped.permute(0, 1, 4, 2, 3).reshape(groups, grouped.shape[1] * k_w, weight.shape[1] * k_h)
    return grouped.reshape(groups, grouped.shape[1], -1)


def fold(matrices: Tensor, shape: Sequence[int], unfolding: str = "channel") -> Tensor:
    """Inverse of `unfold`: ``matrices`` ``[groups, rows, columns]`` back to a weight of ``shape``."""
    if unfolding == "spatial" and len(shape) == 4:
        groups = matrices.shape[0]
        c_out, c_in, k_h, k_w = shape
        split = matrices.reshape(groups, c_out // groups, k_w, c_in, k_h)
        return split.permute(0, 1, 3, 4, 2).reshape(shape)
    return matrices.reshape(shape)


def matrix_shape(shape: Sequence[int], unfolding: str = "channel", groups: int = 1) -> tuple[int, int]:
    """(rows, columns) of one group's matrix, without touching data."""
    c_out, c_in, *kernel = shape
    rows, columns = c_out // groups, c_in
    for size in kernel:
        columns *= size
    if unfolding == "spatial" and len(kernel) == 2:
        rows, columns = rows * kernel[1], c_in * kernel[0]
    return rows, columns
