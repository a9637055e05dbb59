"""Plain PyTorch: ``python examples/plain.py``. Train with the penalty, compress, save."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from task import PENALTY, batch, build_model, build_optimizer, parser, report

import smoothk


def train(steps: int) -> torch.nn.Module:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model().to(device)
    optimizer = build_optimizer(model)
    penalty = smoothk.SmoothnessPenalty(model, **PENALTY)
    for step in range(steps):
        x, labels = batch(step, device=device)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        value = penalty.accumulate_grad()  # adds its gradient into .grad, once per step
        optimizer.step()
        report(step, loss.item(), value.item())
    return model


def main() -> None:
    model = train(parser(__doc__).parse_args().steps)
    result = smoothk.compress(model, keep=0.5)
    print(result.report)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "small.safetensors")
        smoothk.save(result.model, file)
        small = smoothk.load(build_model, file)  # the dense model goes in
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {sum(p.numel() for p in small.parameters())} left")


if __name__ == "__main__":
    main()
