"""How much an error in one layer's weight matters to the model's output, measured on unlabelled inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .layers import Conv
from .macs import run
from .svd import rank_for_energy, squared_singular_values, truncated_factors
from .unfolding import fold

_PROBE_ENERGY = 0.9  # the probe keeps this share of Σσ²: its effect rises above rounding and is still local


def output_sensitivity(
    model: nn.Module, layers: Mapping[str, Conv | nn.Linear], batches: Iterable[Any]
) -> dict[str, float]:
    """Squared change of the output per dropped share of ``Σσ²``, for each layer of ``layers``.

    Each layer in turn is truncated to 90 % of its energy and the model run on the first of ``batches``, in evaluation
    mode and without gradients; ``model`` is not changed.

    Raises:
        ValueError: ``batches`` is empty.
        TypeError: the model's output holds no floating-point tensor.
    """
    batch = next(iter(batches), None)
    if batch is None:
        raise ValueError("calibration must hold at least one batch, got none")
    probe = copy.deepcopy(model).eval()
    weights = {}
    with torch.no_grad():
        reference = _floats(run(probe, batch))
        for name, layer in layers.items():
            weight, groups = probe.get_submodule(name).weight, getattr(layer, "groups", 1)
            squares = squared_singular_values(weight, groups)
            rank = min(rank_for_energy(squares, _PROBE_ENERGY), max(squares.shape[1] - 1, 1))
            dropped = 1 - float(squares[:, :rank].sum() / squares.sum())
            if not dropped > 0:  # rank 1 says it all
                weights[name] = 1.0
                continue
            u, v = truncated_factors(weight, rank, groups)
            original = weight.clone()
            weight.copy_(fold(u @ v, weight.shape))
            weights[name] = float((_floats(run(probe, batch)) - reference).square().sum()) / dropped
            weight.copy_(original)
    return weights


def _floats(output: Any) -> Tensor:
    """Every floating-point tensor inside ``output``, as one vector."""
    found: list[Tensor] = []

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                found.append(value.float().flatten())
        elif isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, tuple | list):
            for item in value:
                visit(item)

    visit(output)
    if not found:
        raise TypeError(f"model's output must hold a floating-point tensor, got {type(output).__name__}")
    return torch.cat(found)
