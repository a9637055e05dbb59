"""Which way of computing a low-rank convolution is the fastest on the CPU: rules with measured constants.

They come from `benchmarks/bench.py low_rank_conv`: the layers of ResNet-18, ResNet-50 and VGG-16 at 10 to 50 % of their
parameters and at full rank, batch 1 to 32, both layouts, two threads with AVX-512. The kernel was the fastest in all
cases but this. `smoothk.tune` measures on the user's machine instead.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from .geometry import Geometry

# Multiply-adds of both factors over those of the dense convolution from which on the library's dense one is faster, for
# kernels of one tap and of more: there the kernel does more of them in a second than the library.
MERGED_FROM = (1.0, 1.2)


@lru_cache(maxsize=4096)
def fastest(geometry: Geometry, dtype: torch.dtype, training: bool = False) -> str:
    """``"fused"``, ``"pair"`` or ``"merged"``.

    Args:
        geometry: of two axes.
        dtype: of the input: float32, bfloat16 or float16.
        training: whether the call has gradients. They are the library's, which takes its own intermediate.
    """
    if training or (dtype == torch.bfloat16 and _library_has_bfloat16()):
        return "pair"
    if factor_macs(geometry) > MERGED_FROM[math.prod(geometry.kernel) > 1] * dense_macs(geometry):
        return "merged"
    return "fused"


def dense_macs(geometry: Geometry) -> int:
    """Multiply-adds of the dense convolution."""
    return math.prod(geometry.output) * geometry.v[1] * math.prod(geometry.kernel)


def factor_macs(geometry: Geometry) -> int:
    """Multiply-adds of the two convolutions."""
    width = geometry.input[3] if geometry.scheme == "spatial" else geometry.output[3]
    between = geometry.output[0] * geometry.output[2] * width
    first = between * math.prod(geometry.v)
    return first + geometry.output[0] * math.prod(geometry.output[2:]) * math.prod(geometry.u)


@lru_cache(maxsize=1)
def _library_has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 in hardware; the kernel, which widens to float32, was not compared there."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
