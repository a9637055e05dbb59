"""The configuration of a training, and the learning rate that it asks for."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from smoothk.recipes import train
from smoothk.recipes.config import SCHEDULES, TrainConfig


def test_one_cycle_is_torchs() -> None:
    settings = TrainConfig(lr=0.4, warmup=0.3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)
    total = 200
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=total, cycle_momentum=False)
    expected = []
    for _ in range(total):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        if len(expected) < total:
            scheduler.step()
    ours = [train.learning_rate(settings, step, total) for step in range(total)]
    # torch counts the rise to the step before 0.3 * total; ours peaks one step later.
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) < 0.4 * 0.02
    assert max(ours) == pytest.approx(0.4)
    assert ours[0] == pytest.approx(0.4 / 25)
    assert ours[-1] == pytest.approx(0.4 / 250_000)


def test_cosine_rises_in_a_line_and_falls_to_zero() -> None:
    settings = TrainConfig(lr=1.0, warmup=0.1, schedule="cosine")
    rates = [train.learning_rate(settings, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    middle = 10 + 89 / 3
    assert train.learning_rate(settings, middle, 100) == pytest.approx((1 + math.cos(math.pi / 3)) / 2)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 7])
@pytest.mark.parametrize("warmup", [0.0, 0.3, 0.99])
def test_learning_rate_is_in_range_for_any_length(schedule: str, total: int, warmup: float) -> None:
    settings = TrainConfig(lr=0.4, warmup=warmup, schedule=schedule)
    rates = [train.learning_rate(settings, step, total) for step in range(total)]
    assert all(0 <= rate <= 0.4 for rate in rates)
    assert max(rates) > 0


def test_config_survives_json() -> None:
    settings = TrainConfig(nuclear=2e-4, unfolding="spatial", model="a.b:c")
    assert TrainConfig.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    with pytest.raises(ValueError, match="config has unknown fields: colour"):
        TrainConfig.from_json({"colour": "red"})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": "mnist"}, ValueError, "data must be one of digits, .*, got 'mnist'"),
        ({"arch": "vgg"}, ValueError, "arch must be one of resnet18, .*, got 'vgg'"),
        ({"optimizer": "adam"}, ValueError, "optimizer must be one of sgd, adamw, got 'adam'"),
        ({"schedule": "step"}, ValueError, "schedule must be one of one-cycle, cosine, got 'step'"),
        ({"precision": "fp8"}, ValueError, "precision must be one of fp32, bf16, got 'fp8'"),
        ({"norm": "l3"}, ValueError, "norm must be one of .*, got 'l3'"),
        ({"unfolding": "rows"}, ValueError, "unfolding must be one of .*, got 'rows'"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"epochs": 1.5}, TypeError, "epochs must be int, got float"),
        ({"epochs": True}, TypeError, "epochs must be int, got bool"),
        ({"batch_size": -4}, ValueError, "batch_size must be at least 1, got -4"),
        ({"nuclear_every": 0}, ValueError, "nuclear_every must be at least 1, got 0"),
        ({"lr": 0.0}, ValueError, "lr must be a finite number above 0, got 0.0"),
        ({"lr": float("nan")}, ValueError, "lr must be a finite number above 0, got nan"),
        ({"lr": "0.1"}, TypeError, "lr must be float, got str"),
        ({"nuclear": -1e-4}, ValueError, "nuclear must be a finite number, at least 0, got -0.0001"),
        ({"first_order": float("inf")}, ValueError, "first_order must be a finite number, at least 0, got inf"),
        ({"momentum": 1.0}, ValueError, "momentum must be at least 0 and below 1, got 1.0"),
        ({"label_smoothing": float("nan")}, ValueError, "label_smoothing must be at least 0 and below 1, got nan"),
        ({"crop_padding": -1}, ValueError, "crop_padding must be at least 0, or None, got -1"),
        ({"flip": "vertical"}, ValueError, "flip must be one of random, alternating, got 'vertical'"),
        ({"validation": 1.0}, ValueError, "validation must be at least 0 and below 1, got 1.0"),
        ({"width": -1.0}, ValueError, "width must be a finite number above 0, got -1.0"),
        ({"device": "toaster"}, ValueError, "device must be .*, got 'toaster'"),
    ],
)
def test_config_names_a_wrong_field(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrainConfig(**changes)
