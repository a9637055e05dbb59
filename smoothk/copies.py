"""Copies of models."""

from __future__ import annotations

import copy

from torch import nn

from .outputs import all_tensors


def deep_copy(model: nn.Module) -> nn.Module:
    """A copy that shares no tensor with ``model``.

    Pruning and the older weight norm keep a computed weight, which `copy.deepcopy` refuses; their hooks compute it
    anew. Some models keep what they computed last, by itself or in lists.
    """
    computed = [value for module in model.modules() for value in all_tensors(vars(module)) if not value.is_leaf]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
