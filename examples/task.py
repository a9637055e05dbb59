"""What every example trains: a small network on made-up images, the same batches on any number of processes."""

from __future__ import annotations

import argparse
import os

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

PENALTY = {"first_order": 1e-2, "nuclear": 1e-3}
STEPS, BATCH = 8, 24
LEARNING_RATE, MOMENTUM = 0.1, 0.9


def build_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 30, 3, stride=2, padding=1),  # 30 rows: the shards of 4 processes differ
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(30 * 4 * 4, 10),
    )


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM)


def images() -> TensorDataset:
    """One epoch of STEPS batches; the label is the image's brightest channel and quadrant, as far as 10 classes go."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * BATCH, 3, 8, 8, generator=generator)
    labels = nn.functional.avg_pool2d(x, 4).flatten(1).argmax(1) % 10
    return TensorDataset(x, labels)


def batch(step: int, rank: int = 0, world: int = 1, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """This process's part of a batch: every ``world``-th image, as a DistributedSampler deals them out."""
    x, labels = images()[step * BATCH + rank : (step + 1) * BATCH : world]
    return x.to(device), labels.to(device)


def world_size() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def report(step: int, loss: float, penalty: float | None = None) -> None:
    print(f"step {step}  loss {loss:.9f}" + ("" if penalty is None else f"  penalty {penalty:.9f}"), flush=True)


def parser(description: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps, at most {STEPS}")
    return options
