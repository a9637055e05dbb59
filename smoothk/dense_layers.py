"""What a dense layer has to be like before its weight is factorised."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def has_own_forward(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``layer``, of a subclass of torch's ``kind``, may compute something else."""
    names = ("forward", "_conv_forward", "__call__")
    return any(
        name in vars(layer) or getattr(type(layer), name, None) is not getattr(kind, name, None) for name in names
    )


def check_forward(name: str, layer: nn.Module, kind: type[nn.Module]) -> None:
    """Raise TypeError unless the argument ``name`` computes what torch's ``kind`` does."""
    if has_own_forward(layer, kind):
        own = f"{type(layer).__name__} with a forward of its own"
        raise TypeError(f"{name} must compute what torch.nn.{kind.__name__} does, got a {own}")


def check_finite(weight: Tensor) -> None:
    """Raise ValueError for a weight without values, or with NaN or Inf."""
    if weight.is_meta:
        raise ValueError("weight must hold values, got a tensor on the meta device")
    if not torch.isfinite(weight.detach()).all():
        raise ValueError("weight must be finite, got NaN or Inf")
