"""What the callbacks share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..penalties import SmoothnessPenalty


class PenaltyPerStep:
    """A `SmoothnessPenalty` that is made when training starts, when the model's parameters are those that are trained.

    Attributes:
        penalty: the `SmoothnessPenalty`, None before training; its ``scale`` is there for schedules.
        value: what it was at the last optimizer step, 0-dim and detached, None before.
    """

    def __init__(self, first_order: float = 1e-3, **options: Any) -> None:
        super().__init__()
        self.options = {"first_order": first_order, **options}
        # What is wrong with the options raises now, not when training starts.
        SmoothnessPenalty([nn.Parameter(torch.zeros(1, 1))], **{**self.options, "select": None})
        self.penalty: SmoothnessPenalty | None = None
        self.value: Tensor | None = None

    def _start(self, model: nn.Module) -> None:
        self.penalty, self.value = SmoothnessPenalty(model, **self.options), None

    def _accumulate(self) -> Tensor:
        assert self.penalty is not None  # `_start` comes first
        self.value = self.penalty.accumulate_grad()
        return self.value
