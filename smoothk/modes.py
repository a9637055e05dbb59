"""Modes of torch that a call should not run in, and of a model that it should."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")


def outside_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, run as outside of `torch.inference_mode`, whose tensors could not be trained afterwards."""

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():  # leaving it would turn gradients on
            return function(*args, **options)
        with torch.inference_mode(False):
            return function(*args, **options)

    return call


def without_autocast(tensors: Sequence[Tensor]) -> AbstractContextManager[object]:
    """Autocast would run the products inside a decomposition, or those of factors, in half precision."""
    device = tensors[0].device.type if tensors else "cpu"
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in evaluation mode; the modes of its modules come back."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
