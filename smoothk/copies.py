"""Copies of models."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

_ATOMS = (type, FunctionType, ModuleType, str, bytes)  # `copy.deepcopy` does not look into them


def deep_copy(model: nn.Module) -> nn.Module:
    """A copy that shares no tensor with ``model``.

    Pruning and the older weight norm keep a computed weight, which `copy.deepcopy` refuses; their hooks compute it
    anew. Some models keep what they computed last, by itself or in lists or other objects.
    """
    computed = [tensor for tensor in _tensors_in(model) if not tensor.is_leaf]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in attributes, dictionaries, lists, tuples and sets, however deep, each once."""
    seen: dict[int, Any] = {}  # holds what it has seen, so that no id is used again
    left = [value]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple | set):
            left += value
        elif hasattr(value, "__dict__") and not isinstance(value, _ATOMS):
            left += vars(value).values()
