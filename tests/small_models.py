"""Models that cover, together, every kind of layer and of container. Inputs go with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from smoothk import LowRankLinear
from smoothk.recipes import models


class Residual(nn.Module):
    """A shared convolution, a list, a dictionary, and a convolution that no input reaches."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, (3, 5), padding=(1, 2)) for _ in range(2))
        self.shared = nn.Conv2d(width, width, 1)
        self.again = self.shared
        self.heads = nn.ModuleDict({"a": nn.Linear(width, 7), "b": nn.Linear(width, 20, bias=False)})
        self.idle = nn.Conv2d(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + self.again(self.shared(block(x).relu()))
        x = x.mean((2, 3))
        return torch.cat([self.heads["a"](x), self.heads["b"](x)], 1)


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, groups=2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, groups=32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 24),
    )


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 40), nn.Dropout(0.5), nn.Linear(40, 30))


def volumetric() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 8, 3), nn.BatchNorm3d(8), nn.Flatten(2), nn.Conv1d(8, 16, 5), nn.BatchNorm1d(16))


# name: factory, input. Every model leaves some layers dense and has parameters outside of its layers.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "plain": (plain, lambda: torch.randn(2, 3, 9, 8)),
    "residual": (Residual, lambda: torch.randn(2, 3, 6, 7)),
    "perceptron": (perceptron, lambda: torch.randn(3, 20)),
    "1-d and 3-d": (volumetric, lambda: torch.randn(2, 2, 5, 4, 5)),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(16, 2, 48, batch_first=True),
        lambda: torch.randn(2, 5, 16),
    ),
    "root convolution": (lambda: nn.Conv2d(6, 12, (3, 4)), lambda: torch.randn(1, 6, 6, 8)),
    "root linear": (lambda: nn.Linear(30, 20), lambda: torch.randn(4, 30)),
}


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class Scaled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Standardized(nn.Conv2d):
    """A subclass that changes its weight on the way."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


def with_hook() -> nn.Module:
    layer = nn.Linear(12, 12)
    layer.register_forward_hook(lambda module, args, output: output + 1)
    return layer


def with_old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(12, 12))


def tied() -> nn.Module:
    pair = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    pair[1].weight = pair[0].weight
    return pair


# why: a module whose layers have to stay dense, the reason that a plan gives, the shape of its input
REFUSED: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "depthwise": (lambda: nn.Conv2d(12, 12, 3, groups=12), "depthwise", (2, 12, 8, 8)),
    "depthwise multiplied": (lambda: nn.Conv1d(12, 24, 3, groups=12), "depthwise", (2, 12, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(12, 12, 3), "transposed", (2, 12, 8, 8)),
    "parametrised": (lambda: parametrizations.weight_norm(nn.Linear(12, 12)), "parametrised", (2, 12)),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(12, 12, 3)), "parametrised", (2, 12, 8, 8)),
    "old weight norm": (with_old_weight_norm, "hook", (2, 12)),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(12, 12), "weight", 0.5), "hook", (2, 12)),
    "hooked": (with_hook, "hook", (2, 12)),
    "own forward": (lambda: Scaled(12, 12), "Scaled has a forward of its own", (2, 12)),
    "own convolution": (lambda: Standardized(12, 12, 3), "Standardized has a forward of its own", (2, 12, 8, 8)),
    "tied": (tied, "tied", (2, 12)),
    "low rank": (lambda: LowRankLinear(12, 12, 2), "low-rank already", (2, 12)),
}


def residual_network(width: float = 0.25, arch: str = "digits_net") -> nn.Module:
    """A small residual network whose batch norms have statistics, scales and shifts of their own, as after training."""
    torch.manual_seed(0)
    model = models.build(arch, num_classes=10, in_channels=1, width=width)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    return model.eval()


def parameters(model: nn.Module) -> int:
    """How many ``model`` has."""
    return sum(p.numel() for p in model.parameters())
