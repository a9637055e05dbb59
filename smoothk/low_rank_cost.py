"""Which way of computing a low-rank convolution is the fastest on the CPU: a model with measured constants."""

from __future__ import annotations

from functools import lru_cache

import torch

from .geometry import Geometry


@lru_cache(maxsize=4096)
def fastest(geometry: Geometry, dtype: torch.dtype, channels_last: bool = False, training: bool = False) -> str:
    """``"fused"``, ``"pair"`` or ``"merged"`` for a two-dimensional ``geometry``."""
    return "pair" if training else "fused"
