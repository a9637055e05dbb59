"""Choice of the method of every low-rank layer by timing on this machine."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from . import backend
from .layers import _LowRank
from .low_rank_conv import METHODS
from .macs import watch
from .report import Table

_METHODS = tuple(method for method in METHODS if method != "auto")
_LEAST_SAMPLES, _MOST_SAMPLES = 7, 50


def tune(model: nn.Module, example_input: Any, *, budget: float = 0.2, verbose: bool = True) -> Table:
    """Time every way of computing each low-rank layer, and have the layer use the fastest from now on.

    For inference with inputs like the example: the best choice depends on the machine, the number of threads, the
    dtype and the sizes. It is kept in ``layer.method`` and in files that `smoothk.save` writes; ``"auto"`` undoes it.

    Args:
        model: the model; only its layers' ``method`` is changed.
        example_input: a batch as the model will get it: a tensor, or the tuple or dict of its arguments.
        budget: seconds for each layer, of which the samples of all methods are taken in turn.
        verbose: print the result.

    Returns:
        One row for each layer that the example reaches: input sizes, rank, milliseconds of each method (median; empty
        where it cannot run), and the choice.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``budget`` is not positive, or no low-rank layer was called.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not budget > 0:
        raise ValueError(f"budget must be positive, got {budget}")
    calls = _calls(model, example_input)
    if not calls:
        raise ValueError("model must have a low-rank layer that the example input reaches, got none")
    rows: list[list[object]] = []
    methods: dict[_LowRank, str] = {}
    for name, inputs in calls.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, _LowRank)  # `_calls` watches no other
        times = _time_methods(layer, inputs, budget)
        methods[layer] = min(times, key=times.__getitem__)
        sizes = " ".join("x".join(map(str, x.shape)) for x in inputs)
        milliseconds = [1e3 * times[m] if m in times else None for m in _METHODS]
        rows.append([name, sizes, layer.rank, *milliseconds, methods[layer]])
    for layer, method in methods.items():  # all or, if something failed, none
        layer.method = method
    table = Table(["layer", "input", "rank", *(f"{m} ms" for m in _METHODS), "method"], rows)
    if verbose:
        print(table)
    return table


def _calls(model: nn.Module, example_input: Any) -> dict[str, list[Tensor]]:
    """An input of every size that each low-rank layer gets, by the layer's name."""
    calls: dict[str, list[Tensor]] = {}

    def keep(name: str, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        if all(x.shape != known.shape for known in calls.setdefault(name, [])):
            calls[name].append(x.clone())

    layers = {name: module for name, module in model.named_modules() if isinstance(module, _LowRank)}
    watch(model, example_input, layers, keep)
    return calls


def _time_methods(layer: _LowRank, inputs: list[Tensor], budget: float) -> dict[str, float]:
    """Median seconds of one pass over ``inputs`` by every method that can run."""
    chosen = layer.method
    methods = [m for m in _METHODS if m != "fused" or _has_kernel(layer, inputs)]
    samples: dict[str, list[float]] = {method: [] for method in methods}

    def sample(method: str) -> float:
        layer.method = method
        start = time.perf_counter()
        for x in inputs:
            layer(x)
        if inputs[0].is_cuda:
            torch.cuda.synchronize(inputs[0].device)
        return time.perf_counter() - start

    try:
        with torch.no_grad():
            for method in methods * 2:  # warm: threads, packed factors, the library's own caches
                sample(method)
            end = time.perf_counter() + budget
            while len(samples[methods[0]]) < _LEAST_SAMPLES or (
                time.perf_counter() < end and len(samples[methods[0]]) < _MOST_SAMPLES
            ):
                for method in methods:
                    samples[method].append(sample(method))
    finally:
        layer.method = chosen
    return {method: median(values) for method, values in samples.items()}


def _has_kernel(layer: _LowRank, inputs: list[Tensor]) -> bool:
    tensors = [t for t in (inputs[0], layer.v, layer.u, layer.bias) if t is not None]  # under autocast, of two dtypes
    chosen = {backend.choose("low_rank_conv", None, [tensor]) for tensor in tensors}
    return getattr(layer, "axes", 0) < 3 and "torch" not in chosen
