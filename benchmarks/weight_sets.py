"""The weights that the benchmarks run on: the conv and linear tensors of real networks, and two made-up sets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class WeightSet:
    """Named tensor shapes: convolutions ``[C_out, C_in, k_h, k_w]``, linear layers ``[C_out, C_in]``."""

    name: str
    title: str
    shapes: tuple[Shape, ...]

    @property
    def parameters(self) -> int:
        """Number of entries over all tensors."""
        return sum(map(math.prod, self.shapes))

    def allocate(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
        """Random weights with the variance ``2 / fan_in`` of initialised networks, and a zero ``.grad`` each."""
        generator = torch.Generator(device).manual_seed(seed)
        weights = []
        for shape in self.shapes:
            weight = torch.empty(shape, device=device, dtype=dtype)
            weight.normal_(0, math.sqrt(2 / math.prod(shape[1:])), generator=generator)
            weights.append(nn.Parameter(weight))
            weights[-1].grad = torch.zeros_like(weight)
        return weights


def _resnet18() -> list[Shape]:
    """ResNet-18 for 32x32 images: a 3x3 stem, basic blocks, ten classes."""
    shapes: list[Shape] = [(64, 3, 3, 3)]
    width = 64
    for stage, channels in enumerate((64, 128, 256, 512)):
        shapes += [(channels, width, 3, 3), *[(channels, channels, 3, 3)] * 3]
        shapes += [(channels, width, 1, 1)] * (stage > 0)
        width = channels
    return [*shapes, (10, width)]


def _resnet50() -> list[Shape]:
    """ResNet-50 for ImageNet: bottlenecks that widen fourfold, a thousand classes."""
    shapes: list[Shape] = [(64, 3, 7, 7)]
    width = 64
    for channels, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(channels, width, 1, 1), (channels, channels, 3, 3), (4 * channels, channels, 1, 1)]
            shapes += [(4 * channels, width, 1, 1)] * (block == 0)
            width = 4 * channels
    return [*shapes, (1000, width)]


def _vit_b16() -> list[Shape]:
    """ViT-B/16: the patch embedding, twelve blocks with fused query, key and value, a thousand classes."""
    block: list[Shape] = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    return [(768, 3, 16, 16), *block * 12, (1000, 768)]


# Primes, one and two rows, a row longer than a tile: what kernels get wrong. For checks, not for timing. No vectors: in
# float32 the l21 gradient of single numbers is a matter of luck where their differences are near sqrt(eps).
_ODD: list[Shape] = [(7, 5, 3, 3), (64, 27), (1, 13), (2, 3), (33, 17), (129, 2), (3, 1031), (131, 2, 1, 1), (5, 4, 7)]

_BUILDERS: dict[str, tuple[str, Callable[[], list[Shape]]]] = {
    "resnet18": ("ResNet-18", _resnet18),
    "resnet50": ("ResNet-50", _resnet50),
    "vit_b16": ("ViT-B/16", _vit_b16),
    "4gib": ("4 GiB", lambda: [(8192, 8192)] * 16),
    "odd": ("odd shapes", lambda: list(_ODD)),
}
WEIGHT_SETS = {name: WeightSet(name, title, tuple(build())) for name, (title, build) in _BUILDERS.items()}


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on ``device``."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
    return 1024 * int(fields["MemAvailable"].split()[0])
