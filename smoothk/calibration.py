"""Unlabelled input batches, checked before anything is computed from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .macs import run
from .modes import evaluating
from .outputs import all_tensors, not_empty


def check_calibration(model: nn.Module, batches: Iterable[Any], argument: str = "calibration") -> None:
    """Run ``model`` on the first batch and say in terms of ``argument`` what does not fit; ``model`` is not changed.

    Raises:
        TypeError: not an iterable, or one that can be read only once.
        ValueError: no batch, one without inputs, on another device, or that the model refuses.
    """
    if isinstance(batches, Tensor):
        raise TypeError(f"{argument} must be an iterable of input batches, got a tensor; pass [tensor]")
    if not isinstance(batches, Iterable) or isinstance(batches, Iterator):
        raise TypeError(f"{argument} must be re-iterable (a list, a DataLoader), got {type(batches).__name__}")
    for batch in not_empty(batches, argument):  # noqa: B007
        break
    else:
        raise ValueError(f"{argument} must hold at least one batch, got none")
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(f"model must hold values for {argument}, got parameters on the meta device")
    devices = {p.device for p in model.parameters()}
    for tensor in all_tensors(batch):
        if len(devices) == 1 and tensor.device not in devices:
            raise ValueError(f"{argument} must be on the model's device, {devices.pop()}, got {tensor.device}")
    try:
        with torch.no_grad(), evaluating(model):
            run(model, batch)
    except Exception as error:  # whatever the model raises
        tensors = list(all_tensors(batch))
        got = ", ".join(f"{list(t.shape)} of {str(t.dtype).removeprefix('torch.')}" for t in tensors)
        labelled = isinstance(batch, tuple | list) and len(tensors) == 2 and tensors[1].dim() <= 1
        hint = " (leave the labels out: [x for x, _ in batches])" if labelled else ""
        begin = f"{argument} must hold inputs of the model, got {got or type(batch)}"
        raise ValueError(f"{begin}: {error}{hint}") from error
