"""Multiply-accumulate operations of convolutions and linear layers, counted by running the model once."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .layers import _LowRank, _LowRankConvNd
from .modes import evaluating
from .transposed import transposed_linear_types
from .unfolding import matrix_shape


@dataclass
class LayerCalls:
    """What one layer was called with: ``(positions out, positions between)`` of each call, batch included.

    Positions between are those of a spatial factorisation's intermediate: output height times input width.
    """

    dense: int = 0
    positions: list[tuple[int, int]] = field(default_factory=list)

    def per_rank(self, shape: Sequence[int], groups: int, scheme: str) -> int:
        """MACs that one unit of rank costs, over all groups and calls."""
        rows, columns = matrix_shape(shape, scheme, groups)
        spatial = scheme == "spatial" and len(shape) == 4
        return sum(groups * (rows * out + columns * (between if spatial else out)) for out, between in self.positions)


def run(model: nn.Module, batch: Any) -> Any:
    """``model`` on a tensor, or on the tuple or dict of its arguments; as it is written, also if it is compiled."""
    compiled = "torch._dynamo.eval_frame" in sys.modules  # the hooks here raise and write to lists
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        if isinstance(batch, Mapping):
            return model(**batch)
        if isinstance(batch, tuple | list):
            return model(*batch)
        return model(batch)


def watch(
    model: nn.Module,
    example_input: Any,
    layers: Mapping[str, nn.Module],
    seen: Callable[[str, nn.Module, Tensor, Tensor], None],
) -> None:
    """Run ``model`` once on ``example_input``, in evaluation mode and without gradients; the model is not changed.

    Args:
        seen: called with name, layer, input and output at every call of one of ``layers``.
    """
    handles = []

    def hook(name: str) -> Callable[..., None]:
        def called(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
            seen(name, layer, args[0] if args else next(iter(kwargs.values())), output)

        return called

    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_hook(hook(name), with_kwargs=True))
        with torch.no_grad(), evaluating(model):
            run(model, example_input)
    finally:
        for handle in handles:
            handle.remove()


def count_calls(model: nn.Module, example_input: Any) -> dict[str, LayerCalls]:
    """Calls of every convolution, linear and low-rank layer of ``model`` in evaluation mode; the model is not
    changed."""
    calls: dict[str, LayerCalls] = {}
    kinds: tuple[type[nn.Module], ...] = (_ConvNd, nn.Linear, _LowRank, *transposed_linear_types())

    def count(name: str, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        entry = calls.setdefault(name, LayerCalls())
        if isinstance(layer, _ConvNd | _LowRankConvNd):
            axes = len(layer.kernel_size)
            batch = math.prod(output.shape[: -axes - 1])
            out = batch * math.prod(output.shape[-axes:])
            width = x.shape[-1]
            if layer.padding_mode != "zeros":  # padded ahead of both convolutions
                pad = layer._pad if isinstance(layer, _LowRank) else layer._reversed_padding_repeated_twice
                width += sum(pad[:2])
            between = batch * output.shape[-2] * width if axes == 2 else out
        else:
            out = between = math.prod(output.shape[:-1])
        entry.positions.append((out, between))
        entry.dense += _macs(layer, out, between, x)

    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    watch(model, example_input, layers, count)
    return calls


def _macs(module: nn.Module, out: int, between: int, x: Tensor) -> int:
    """MACs of one call."""
    if isinstance(module, _LowRank):
        spatial = getattr(module, "scheme", "channel") == "spatial"
        return module.v.numel() * (between if spatial else out) + module.u.numel() * out
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, _ConvNd) and module.transposed:  # every input position meets the whole kernel
        return weight.numel() * (x.numel() // module.in_channels)
    return weight.numel() * out


def count_macs(model: nn.Module, example_input: Any) -> int:
    """MACs of all convolutions and linear layers of ``model`` for one ``example_input`` (its batch counts)."""
    return sum(entry.dense for entry in count_calls(model, example_input).values())
