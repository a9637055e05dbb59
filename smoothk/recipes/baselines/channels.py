"""Channels of a residual network that can be removed or merged: who writes them, who reads them.

Methods that take whole channels out, pruning and folding, share this: they say which share of the channels remains,
and hand in smaller weights for the layers on either side.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from smoothk.recipes.models import BasicBlock, PadShortcut, ResNet


@dataclass
class Channels:
    """Channels that stay or go together, for ``writers`` are added up and ``readers`` see the sum."""

    writers: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = field(default_factory=list)
    readers: list[nn.Conv2d | nn.Linear] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many there are."""
        return self.writers[0][0].out_channels


def inner_channels(model: nn.Module) -> list[Channels]:
    """Channels between the two convolutions of every block.

    Raises:
        ValueError: ``model`` has no `BasicBlock`.
    """
    blocks = [module for module in model.modules() if isinstance(module, BasicBlock)]
    if not blocks:
        raise ValueError("model must have residual blocks (smoothk.recipes.models.BasicBlock), got none")
    return [Channels([(block.conv1, block.bn1)], [block.conv2]) for block in blocks]


def stream_channels(model: nn.Module) -> list[Channels]:
    """Channels that blocks add to, one group for all blocks up to the next projection.

    Raises:
        ValueError: ``model`` is no `ResNet` with projections, whose shortcuts could lead anywhere.
    """
    if not isinstance(model, ResNet) or any(isinstance(m, PadShortcut) for m in model.modules()):
        raise ValueError(f"model must be a ResNet with projection shortcuts, got {type(model).__name__}")
    groups = [Channels([(model.conv1, model.bn1)])]
    for block in (module for module in model.layers.modules() if isinstance(module, BasicBlock)):
        groups[-1].readers.append(block.conv1)
        if isinstance(block.shortcut, nn.Sequential):
            convolution, norm = block.shortcut
            assert isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            groups[-1].readers.append(convolution)
            groups.append(Channels([(convolution, norm)]))
        groups[-1].writers.append((block.conv2, block.bn2))
    groups[-1].readers.append(model.fc)
    return groups


def uniform_counts(model: nn.Module, groups: Sequence[Channels], keep: float) -> list[int]:
    """Channels that stay in each group (at least one), for the largest common fraction that the budget allows.

    Args:
        model: the network that the groups are of.
        groups: as above.
        keep: share of ALL the model's parameters that may remain.

    Raises:
        ValueError: one channel a group is already too many.
    """
    total = sum(p.numel() for p in model.parameters())
    fractions = sorted({k / group.count for group in groups for k in range(group.count + 1)})

    def at(fraction: float) -> list[int]:
        return [max(1, math.floor(fraction * group.count + 1e-9)) for group in groups]

    def left(fraction: float) -> int:
        return _parameters(model, groups, at(fraction))

    index = bisect_left(range(len(fractions)), True, key=lambda i: left(fractions[i]) > keep * total)
    if index == 0:
        raise ValueError(f"keep must be at least {left(0) / total:.4f} for this model, got {keep}")
    return at(fractions[index - 1])


def _parameters(model: nn.Module, groups: Sequence[Channels], counts: Sequence[int]) -> int:
    """Parameters of the model once each group has ``counts`` channels."""
    written: Mapping[int, int] = {id(conv): k for g, k in zip(groups, counts, strict=True) for conv, _ in g.writers}
    read: Mapping[int, int] = {id(layer): k for g, k in zip(groups, counts, strict=True) for layer in g.readers}
    norms = {id(norm): k for g, k in zip(groups, counts, strict=True) for _, norm in g.writers}
    total = sum(p.numel() for p in model.parameters())
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and (id(module) in written or id(module) in read):
            rows, columns, *kernel = module.weight.shape
            after = written.get(id(module), rows) * read.get(id(module), columns) * math.prod(kernel)
            total += after - module.weight.numel()
        elif isinstance(module, nn.BatchNorm2d) and id(module) in norms:
            total += 2 * (norms[id(module)] - module.num_features)
    return total


def statistics_of(norm: nn.BatchNorm2d) -> dict[str, Tensor]:
    """``scale``, ``shift``, ``mean`` and ``var``, as `set_writer` takes them."""
    assert norm.running_mean is not None and norm.running_var is not None
    return {"scale": norm.weight, "shift": norm.bias, "mean": norm.running_mean, "var": norm.running_var}


@torch.no_grad()
def set_writer(conv: nn.Conv2d, norm: nn.BatchNorm2d, weight: Tensor, **statistics: Tensor) -> None:
    """Give ``conv`` a weight with other rows and ``norm`` ``scale``, ``shift``, ``mean`` and ``var``."""
    conv.weight = nn.Parameter(weight.clone())
    conv.out_channels = norm.num_features = len(weight)
    norm.weight, norm.bias = (nn.Parameter(statistics[name].clone()) for name in ("scale", "shift"))
    norm.running_mean, norm.running_var = statistics["mean"].clone(), statistics["var"].clone()


@torch.no_grad()
def set_reader(layer: nn.Conv2d | nn.Linear, weight: Tensor) -> None:
    """Give ``layer`` a weight with other columns."""
    layer.weight = nn.Parameter(weight.clone())
    setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", weight.shape[1])


@torch.no_grad()
def select(group: Channels, kept: Tensor) -> None:
    """Leave only the channels ``kept`` (int64, in order), in place."""
    for conv, norm in group.writers:
        statistics = {name: value[kept] for name, value in statistics_of(norm).items()}
        set_writer(conv, norm, conv.weight[kept], **statistics)
    for layer in group.readers:
        set_reader(layer, layer.weight[:, kept])
