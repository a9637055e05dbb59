"""The convolutions of the networks that low-rank layers are measured on, and a ResNet-50.

The lists are written by hand from Table 1 of He et al. (arXiv 1512.03385, the stride of a ResNet-50 block in its 3x3
layer as in torchvision) and configuration D of Simonyan & Zisserman (arXiv 1409.1556). No layer has a bias: those of
the ResNets have none, those of VGG-16 cost no time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class ConvLayer:
    """A square convolution with padding ``kernel // 2`` on images of ``size`` x ``size``."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    size: int

    @property
    def name(self) -> str:
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}×{self.kernel} {self.in_channels}→{self.out_channels} {self.size}²{stride}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the weight."""
        return (self.out_channels, self.in_channels, self.kernel, self.kernel)

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense layer for one image."""
        return math.prod(self.shape) * self.out_size**2


@dataclass(frozen=True)
class ConvNetwork:
    """Every convolution of a network, ``(how often, layer)``."""

    name: str
    title: str
    convolutions: tuple[tuple[int, ConvLayer], ...]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(layer.shape for count, layer in self.convolutions for _ in range(count))

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.shapes))

    @property
    def macs(self) -> int:
        return sum(count * layer.macs for count, layer in self.convolutions)


def _network(name: str, title: str, *rows: tuple[int, int, int, int, int, int]) -> ConvNetwork:
    return ConvNetwork(name, title, tuple((count, ConvLayer(*row)) for count, *row in rows))


# (how often, C_in, C_out, kernel, stride, height and width of the input)
_NETWORKS = (
    _network(
        "resnet18_cifar",
        "ResNet-18, 32×32",
        (1, 3, 64, 3, 1, 32),
        (4, 64, 64, 3, 1, 32),
        (1, 64, 128, 3, 2, 32),
        (1, 64, 128, 1, 2, 32),
        (3, 128, 128, 3, 1, 16),
        (1, 128, 256, 3, 2, 16),
        (1, 128, 256, 1, 2, 16),
        (3, 256, 256, 3, 1, 8),
        (1, 256, 512, 3, 2, 8),
        (1, 256, 512, 1, 2, 8),
        (3, 512, 512, 3, 1, 4),
    ),
    _network(
        "resnet18",
        "ResNet-18, 224×224",
        (1, 3, 64, 7, 2, 224),
        (4, 64, 64, 3, 1, 56),
        (1, 64, 128, 3, 2, 56),
        (1, 64, 128, 1, 2, 56),
        (3, 128, 128, 3, 1, 28),
        (1, 128, 256, 3, 2, 28),
        (1, 128, 256, 1, 2, 28),
        (3, 256, 256, 3, 1, 14),
        (1, 256, 512, 3, 2, 14),
        (1, 256, 512, 1, 2, 14),
        (3, 512, 512, 3, 1, 7),
    ),
    _network(
        "resnet50",
        "ResNet-50, 224×224",
        (1, 3, 64, 7, 2, 224),
        (1, 64, 64, 1, 1, 56),
        (3, 64, 64, 3, 1, 56),
        (4, 64, 256, 1, 1, 56),
        (2, 256, 64, 1, 1, 56),
        (1, 256, 128, 1, 1, 56),
        (1, 128, 128, 3, 2, 56),
        (1, 256, 512, 1, 2, 56),
        (4, 128, 512, 1, 1, 28),
        (3, 512, 128, 1, 1, 28),
        (3, 128, 128, 3, 1, 28),
        (1, 512, 256, 1, 1, 28),
        (1, 256, 256, 3, 2, 28),
        (1, 512, 1024, 1, 2, 28),
        (6, 256, 1024, 1, 1, 14),
        (5, 1024, 256, 1, 1, 14),
        (5, 256, 256, 3, 1, 14),
        (1, 1024, 512, 1, 1, 14),
        (1, 512, 512, 3, 2, 14),
        (1, 1024, 2048, 1, 2, 14),
        (3, 512, 2048, 1, 1, 7),
        (2, 2048, 512, 1, 1, 7),
        (2, 512, 512, 3, 1, 7),
    ),
    _network(
        "vgg16",
        "VGG-16, 224×224",
        (1, 3, 64, 3, 1, 224),
        (1, 64, 64, 3, 1, 224),
        (1, 64, 128, 3, 1, 112),
        (1, 128, 128, 3, 1, 112),
        (1, 128, 256, 3, 1, 56),
        (2, 256, 256, 3, 1, 56),
        (1, 256, 512, 3, 1, 28),
        (2, 512, 512, 3, 1, 28),
        (3, 512, 512, 3, 1, 14),
    ),
)
CONV_NETWORKS = {network.name: network for network in _NETWORKS}


def distinct_layers(network: ConvNetwork) -> list[ConvLayer]:
    """The layers of ``network`` that no earlier one of `CONV_NETWORKS` has, so that a table over all counts each once.

    A network's first layer, on three channels, is not among them: it has little to give and stays dense.
    """
    names = list(CONV_NETWORKS)
    earlier = [CONV_NETWORKS[name] for name in names[: names.index(network.name)]] if network.name in names else []
    seen = {layer for other in earlier for _, layer in other.convolutions}
    return [layer for _, layer in network.convolutions if layer.in_channels > 3 and layer not in seen]


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with batch norm, added to the shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != 4 * channels:
            projection = nn.Conv2d(in_channels, 4 * channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(4 * channels))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class ResNet50(nn.Module):
    """ResNet-50 for ImageNet."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        blocks: list[nn.Module] = []
        width = 64
        for stage, count in enumerate((3, 4, 6, 3)):
            channels = 64 * 2**stage
            for block in range(count):
                blocks.append(Bottleneck(width, channels, 2 if stage and not block else 1))
                width = 4 * channels
        self.layers = nn.Sequential(*blocks)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to logits [N, num_classes]."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        return self.fc(self.layers(x).mean(dim=(2, 3)))
