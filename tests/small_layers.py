"""Low-rank layers of every kind, and what they should give."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import smoothk
from smoothk.layers import _LowRank


def layers() -> Iterator[tuple[_LowRank, Tensor]]:
    """A layer of each kind that has a kernel, and an input."""
    yield smoothk.LowRankConv2d(8, 12, 3, 5, padding=1), torch.randn(2, 8, 7, 6)
    yield smoothk.LowRankConv2d(8, 12, 3, 5, stride=2, padding=1, scheme="spatial"), torch.randn(2, 8, 7, 6)
    yield smoothk.LowRankConv2d(8, 12, (4, 2), 3, padding="same", groups=2, bias=False), torch.randn(2, 8, 7, 6)
    yield smoothk.LowRankConv2d(6, 4, 3, 3, padding=1, padding_mode="reflect"), torch.randn(1, 6, 5, 5)
    yield smoothk.LowRankConv1d(8, 12, 3, 5, padding=1), torch.randn(2, 8, 9)
    yield smoothk.LowRankLinear(8, 12, 5), torch.randn(2, 3, 8)


def expected(layer: _LowRank, x: Tensor) -> Tensor:
    """The dense layer in float64."""
    dense = layer.to_linear() if isinstance(layer, smoothk.LowRankLinear) else layer.to_conv()
    dense.weight = nn.Parameter(copy.deepcopy(layer).double().weight)
    return dense.double()(x.double())


def with_method(layer: _LowRank, method: str) -> _LowRank:
    layer.method = method
    return layer
