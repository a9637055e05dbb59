"""What a model gives back, whatever it is wrapped in."""

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


def first_batches(batches: Iterable[Any]) -> list[Any]:
    """Whole batches until there are `INPUTS` inputs."""
    taken, count = [], 0
    for batch in batches:
        taken.append(batch)
        first = next(all_tensors(batch), None)
        count += len(first) if first is not None and first.dim() else 1
        if count >= INPUTS:
            break
    return taken
