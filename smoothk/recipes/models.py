"""Residual networks for small images (He et al. 2016, arXiv 1512.03385) and how networks are built by name.

Two families of them. `resnet18` and `resnet34` are the ImageNet networks of Table 1 with a 3x3 stem and no max-pool, as
is usual for 32x32 images; their shortcuts project (1x1 convolution and batch norm, option B). `resnet20` and `resnet56`
are the CIFAR networks of section 4.2; their shortcuts pad with zero channels (option A). `digits_net` is a member of
the first family with three blocks, for 8x8 images. The transformer `vit` is in `smoothk.recipes.vit`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from smoothk.recipes.vit import ViT

# arch: (blocks per stage, channels of the first stage at width 1, shortcut)
RESNETS: dict[str, tuple[tuple[int, ...], int, str]] = {
    "resnet18": ((2, 2, 2, 2), 64, "projection"),
    "resnet34": ((3, 4, 6, 3), 64, "projection"),
    "resnet20": ((3, 3, 3), 16, "pad"),
    "resnet56": ((9, 9, 9), 16, "pad"),
    "digits_net": ((1, 1, 1), 32, "projection"),
}
# arch: (blocks, heads, channels of a head at width 1, side of a patch)
VITS: dict[str, tuple[int, int, int, int]] = {"vit": (4, 4, 32, 4)}
ARCHITECTURES = (*RESNETS, *VITS)


class PadShortcut(nn.Module):
    """Identity shortcut with a stride that fills the new channels with zeros (option A)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        before = self.extra_channels // 2
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, before, self.extra_channels - before))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to the shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif shortcut == "pad":
            self.shortcut = PadShortcut(in_channels, out_channels, stride)
        else:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network of basic blocks for small images; its weights start from PyTorch's defaults.

    Args:
        blocks: number of blocks of each stage; the channels double and, from the second stage on, the sides halve.
        channels: channels of the stem and the first stage.
        num_classes: length of the output.
        in_channels: channels of the images.
        stem_stride: stride of the 3x3 stem; 2 makes every later stage four times cheaper.
        shortcut: "projection" (1x1 convolution and batch norm) or "pad" (zero channels) where the shape changes.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        channels: int,
        num_classes: int,
        *,
        in_channels: int = 3,
        stem_stride: int = 1,
        shortcut: str = "projection",
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        stages: list[nn.Module] = []
        width = channels
        for index, count in enumerate(blocks):
            out_channels = channels * 2**index
            stage: list[nn.Module] = []
            for block in range(count):
                stride = 2 if index > 0 and block == 0 else 1
                stage.append(BasicBlock(width, out_channels, stride, shortcut))
                width = out_channels
            stages.append(nn.Sequential(*stage))
        self.layers = nn.Sequential(*stages)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, in_channels, H, W] to logits [N, num_classes]."""
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean(dim=(2, 3)))


def build(arch: str, num_classes: int, in_channels: int = 3, width: float = 1.0, stem_stride: int = 1) -> nn.Module:
    """Build a network by name.

    Args:
        arch: one of `ARCHITECTURES`.
        num_classes: number of classes, at least 1.
        in_channels: channels of the images, at least 1.
        width: factor on the channels of every stage, or of every head; those of the first are rounded to a whole
            number.
        stem_stride: stride of the first convolution, at least 1; of a transformer, factor on the side of its patches.

    Raises:
        ValueError: an unknown name, or a number out of its range.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
    for name, value in (("num_classes", num_classes), ("in_channels", in_channels), ("stem_stride", stem_stride)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    base = RESNETS[arch][1] if arch in RESNETS else VITS[arch][2]
    channels = round(base * width) if math.isfinite(width) else 0
    if channels < 1:
        raise ValueError(f"width must give {arch} at least one channel (at least {1 / base:g}), got {width:g}")
    if arch in VITS:
        depth, heads, _, patch = VITS[arch]
        return ViT(depth, heads * channels, heads, patch * stem_stride, num_classes, in_channels=in_channels)
    blocks, _, shortcut = RESNETS[arch]
    return ResNet(blocks, channels, num_classes, in_channels=in_channels, stem_stride=stem_stride, shortcut=shortcut)


def from_factory(target: str, **kwargs: Any) -> nn.Module:
    """Call a model factory given as `"package.module:function"`.

    Args:
        target: importable module and the name of a callable in it, with a colon between them.
        **kwargs: passed on to the factory.

    Raises:
        ValueError: the target is malformed, cannot be imported, or did not return an `nn.Module`.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise ValueError(f'model must look like "package.module:factory", got {target!r}')
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises, and a malformed name
        raise ValueError(f"model {target!r}: cannot import {module_name!r}: {error}") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ValueError(f"model {target!r}: module {module_name!r} has no callable {attribute!r}")
    try:
        model = factory(**kwargs)
    except TypeError as error:
        names = ", ".join(kwargs) or "no arguments"
        raise ValueError(f"model {target!r}: calling the factory with {names} failed: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {target!r}: the factory must return a torch.nn.Module, got {type(model).__name__}")
    return model
