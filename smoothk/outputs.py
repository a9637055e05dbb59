"""What a model takes and gives back, whatever it is wrapped in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

INPUTS = 512  # from which on a plan is not worth more of them


def all_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a batch or an output, depth first."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from all_tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from all_tensors(item)


def floating_tensors(value: Any) -> list[Tensor]:
    """The floating-point ones."""
    return [tensor for tensor in all_tensors(value) if tensor.is_floating_point()]


def is_logits(outputs: list[Tensor]) -> bool:
    """Whether ``outputs`` is one tensor ``[N, classes]``, which is taken as the logits of a classifier."""
    return len(outputs) == 1 and outputs[0].dim() == 2 and outputs[0].shape[1] > 1


def not_empty(batches: Iterable[Any], argument: str) -> Iterator[Any]:
    """Every batch; ValueError in terms of ``argument`` for one of empty tensors, whose statistics would be 0."""
    for batch in batches:
        sizes = [list(tensor.shape) for tensor in all_tensors(batch) if tensor.dim()]
        if sizes and all(0 in size for size in sizes):
            raise ValueError(f"{argument} must hold inputs in every batch, got a batch of shape {sizes[0]}")
        yield batch


def first_batches(batches: Iterable[Any]) -> list[Any]:
    """Whole batches of a calibration until there are `INPUTS` inputs."""
    taken, count = [], 0
    for batch in not_empty(batches, "calibration"):
        taken.append(batch)
        first = next(all_tensors(batch), None)
        count += len(first) if first is not None and first.dim() else 1
        if count >= INPUTS:
            break
    return taken
