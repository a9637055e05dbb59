"""Images as networks: a SIREN that maps pixel positions to colours, fitted with or without a smoothness penalty.

Sitzmann et al. 2020, "Implicit Neural Representations with Periodic Activation Functions" (arXiv 2006.09661). The
penalty acts on the hidden layers, which hold nearly all parameters and are what truncated SVD makes smaller.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothk.penalties import SmoothnessPenalty
from smoothk.recipes.dataset import DataError

IMAGES = ("china.jpg", "flower.jpg")
EVERY = 5  # steps that share a polar factor of the nuclear norm


@dataclass(frozen=True)
class FitConfig:
    """Everything that decides the outcome of a fit.

    Attributes:
        image: one of `IMAGES`, the sample images of scikit-learn.
        size: side in pixels of the square from its middle, resized.
        factor: the network sees the image averaged over squares of this side; 1 is the image itself.
        width, depth: units of a hidden layer, and number of hidden layers behind the first.
        omega: frequency of the sines, ω₀ of the paper.
        steps, batch_size: Adam steps, and pixels in each, drawn anew with replacement.
        lr: learning rate, which falls to 0 in half a cosine.
        first_order, second_order, nuclear: coefficients of `smoothk.SmoothnessPenalty` on the hidden layers.
        penalty_start, penalty_full: shares of the steps before which its scale is 0, and from which it is 1; it rises
            in a line between them.
        decoupled: subtract the penalty's gradient from the weights, times the learning rate, beside Adam's step,
            instead of adding it to the gradient that Adam divides by its own size.
        seed: of the initial weights and of the pixels.
    """

    image: str = "china.jpg"
    size: int = 128
    factor: int = 1
    width: int = 128
    depth: int = 3
    omega: float = 30.0
    steps: int = 1500
    batch_size: int = 1024
    lr: float = 1e-3
    first_order: float = 0.0
    second_order: float = 0.0
    nuclear: float = 0.0
    penalty_start: float = 0.0
    penalty_full: float = 0.2
    decoupled: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.image not in IMAGES:
            raise ValueError(f"image must be one of {', '.join(IMAGES)}, got {self.image!r}")
        for name in ("size", "factor", "width", "depth", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.size % self.factor:
            raise ValueError(f"size must be a multiple of factor ({self.factor}), got {self.size}")
        for name in ("omega", "lr"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number above 0, got {value}")
        if not 0 <= self.penalty_start <= self.penalty_full <= 1:
            raise ValueError(
                "penalty_start and penalty_full must be in [0, 1] and in this order, got "
                f"{self.penalty_start} and {self.penalty_full}"
            )

    def to_json(self) -> dict[str, Any]:
        """The configuration as JSON-able values."""
        return asdict(self)


class Sine(nn.Module):
    """``sin(omega x)``."""

    def __init__(self, omega: float) -> None:
        super().__init__()
        self.omega = omega

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to the same."""
        return torch.sin(self.omega * x)

    def extra_repr(self) -> str:
        return f"{self.omega:g}"


class Siren(nn.Module):
    """Linear layers with sines between them, started as in section 3.2 of the paper.

    ``hidden`` are the ``depth`` layers [width, width] between the first and the last.
    """

    def __init__(self, width: int, depth: int, omega: float, *, in_features: int = 2, out_features: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(in_features, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, out_features)
        self.sine = Sine(omega)
        bound = math.sqrt(6 / width) / omega
        nn.init.uniform_(self.first.weight, -1 / in_features, 1 / in_features)
        for layer in (*self.hidden, self.last):
            nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map positions [N, in_features] to values [N, out_features]."""
        x = self.sine(self.first(x))
        for layer in self.hidden:
            x = self.sine(layer(x))
        return self.last(x)


def load_image(name: str, size: int) -> Tensor:
    """The largest square from the middle of a sample image, float32 [3, size, size] in [0, 1].

    Resized by PIL's Lanczos filter.

    Raises:
        DataError: scikit-learn or Pillow is not installed.
        ValueError: an unknown name, or a size below 1.
    """
    if name not in IMAGES:
        raise ValueError(f"name must be one of {', '.join(IMAGES)}, got {name!r}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    try:
        import numpy
        from PIL import Image
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        needed = "sample images need scikit-learn and Pillow: pip install scikit-learn pillow"
        raise DataError(f"{needed} ({error})") from None
    image = Image.fromarray(load_sample_image(name))
    side = min(image.size)
    left, top = ((whole - side) // 2 for whole in image.size)
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float() / 255


def positions(size: int) -> Tensor:
    """Centres of the pixels of a square on [-1, 1]², float32 [size², 2], row by row; (x, y) each."""
    line = (2 * torch.arange(size) + 1) / size - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def seen(config: FitConfig) -> Tensor:
    """The image that the network is fitted to, float32 [3, side, side] in [0, 1]."""
    return F.avg_pool2d(load_image(config.image, config.size), config.factor)


def fit(config: FitConfig) -> Siren:
    """Fit a network to an image by Adam on the mean squared error; the caller's random state is left as it was.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    image = seen(config)
    x, y = positions(image.shape[1]), 2 * image.flatten(1).t().contiguous() - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Siren(config.width, config.depth, config.omega)
        coefficients = {name: getattr(config, name) for name in ("first_order", "second_order", "nuclear")}
        weights = [layer.get_parameter("weight") for layer in model.hidden]
        penalty = SmoothnessPenalty(weights, **coefficients, every=EVERY) if any(coefficients.values()) else None
        optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
        for step in range(config.steps):
            lr = config.lr * (1 + math.cos(math.pi * step / config.steps)) / 2
            optimizer.param_groups[0]["lr"] = lr
            chosen = torch.randint(len(x), (config.batch_size,))
            optimizer.zero_grad()
            loss = F.mse_loss(model(x[chosen]), y[chosen])
            loss.backward()
            if penalty is not None:
                penalty.scale = penalty_scale(config, step)
            if penalty is not None and not config.decoupled:
                penalty.accumulate_grad()
            optimizer.step()
            if penalty is not None and config.decoupled:
                optimizer.zero_grad()
                penalty.accumulate_grad()
                with torch.no_grad():
                    for weight in weights:
                        if weight.grad is not None:
                            weight.sub_(lr * weight.grad)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is not finite ({loss.item()}): lower lr ({config.lr:g})")
    return model.eval()


def penalty_scale(config: FitConfig, step: int) -> float:
    """Factor on the penalty in a step."""
    done, start, full = step / config.steps, config.penalty_start, config.penalty_full
    if done < start:
        return 0.0
    return min((done - start) / (full - start), 1.0) if full > start else 1.0


@torch.no_grad()
def render(model: nn.Module, size: int) -> Tensor:
    """What a fitted network shows, float32 [3, size, size], clipped to [0, 1]."""
    colours = torch.cat([model(part) for part in positions(size).split(1 << 14)])
    return ((colours + 1) / 2).clamp(0, 1).t().reshape(3, size, size)


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1]; infinite where they are equal."""
    error = F.mse_loss(image.double(), reference.double()).item()
    return -10 * math.log10(error) if error else math.inf
