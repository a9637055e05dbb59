"""What a layer takes in seconds, dense and at any rank: measured at a few ranks on this machine, interpolated between.

Timings are noisy and hold for one machine, thread count, dtype and input size; the same call on another day can give
another plan.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .layers import _FACTORIZED, Conv, LowRankLinear, _LowRank
from .macs import run, watch
from .modes import evaluating
from .svd import full_rank, parameters_per_rank

_SHARES = (0.0, 0.1, 0.3, 0.6, 1.0)  # of the rank from which the factors are larger than the weight
Inputs = list[tuple[Any, int]]  # a batch and how often the layer gets one like it
_LEAST_SAMPLES, _MOST_SAMPLES = 5, 30


@dataclass(frozen=True)
class LayerTimes:
    """Nanoseconds of one pass of a layer over all inputs that it gets: dense, and by scheme at rising ranks."""

    dense: int
    ranks: Mapping[str, list[int]]
    times: Mapping[str, list[int]]

    def at(self, scheme: str, rank: int) -> int:
        """Nanoseconds at ``rank``, on the straight line between the measured ranks beside it; never falling."""
        ranks, times = self.ranks[scheme], self.times[scheme]
        i = min(max(bisect_right(ranks, rank), 1), len(ranks) - 1)
        if len(ranks) == 1 or rank <= ranks[0]:
            return times[0]
        share = min((rank - ranks[i - 1]) / (ranks[i] - ranks[i - 1]), 1.0)
        return round(times[i - 1] + share * (times[i] - times[i - 1]))


def measure_model(model: nn.Module, example_input: Any, budget: float = 0.5) -> int:
    """Nanoseconds of one forward pass in evaluation mode, the median of what ``budget`` seconds allow."""
    with evaluating(model):
        return _medians({"model": model}, [(example_input, 1)], budget)["model"]


def measure_layers(
    model: nn.Module,
    example_input: Any,
    layers: Mapping[str, Conv | nn.Linear],
    schemes: Callable[[Conv | nn.Linear], tuple[str, ...]],
    budget: float = 0.2,
) -> dict[str, LayerTimes]:
    """Time ``layers``, those that the example reaches, on random inputs of the sizes that they get.

    Args:
        model: not changed.
        example_input: a batch as the model will get it.
        layers: by name in ``model``.
        schemes: those worth timing for a layer.
        budget: seconds for each layer; the samples of all its variants are taken in turn.
    """
    found = {}
    # Not `layers`: for a transposed weight they hold a linear layer that the model does not call.
    called = {name: model.get_submodule(name) for name in layers}
    for name, inputs in _input_kinds(model, example_input, called).items():
        found[name] = _measure_layer(layers[name], inputs, schemes(layers[name]), budget)
    return found


def _measure_layer(layer: Conv | nn.Linear, inputs: Inputs, schemes: tuple[str, ...], budget: float) -> LayerTimes:
    shape, groups = layer.weight.shape, getattr(layer, "groups", 1)
    ranks = {}
    for scheme in schemes:
        even = min(layer.weight.numel() // parameters_per_rank(shape, groups, scheme), full_rank(shape, groups, scheme))
        ranks[scheme] = sorted({max(1, math.ceil(share * even)) for share in _SHARES})
    variants: dict[Any, nn.Module] = {"dense": layer}
    for scheme in schemes:
        variants.update({(scheme, rank): _random_layer(layer, scheme, rank) for rank in ranks[scheme]})
    medians = _medians(variants, inputs, budget)
    times = {}
    for scheme in schemes:
        measured = [medians[scheme, rank] for rank in ranks[scheme]]
        times[scheme] = [max(measured[: i + 1]) for i in range(len(measured))]  # a rank more is never faster
    return LayerTimes(medians["dense"], ranks, times)


def _random_layer(layer: Conv | nn.Linear, scheme: str, rank: int) -> _LowRank:
    if isinstance(layer, nn.Linear):
        new: _LowRank = LowRankLinear._like(layer, rank, scheme)
    else:
        new = _FACTORIZED[len(layer.kernel_size)]._like(layer, rank, scheme)
    for parameter in new.requires_grad_(False).parameters():
        parameter.copy_(_random_tensor(parameter.shape, parameter.dtype, parameter.device))
    return new.eval()


def _input_kinds(model: nn.Module, example_input: Any, layers: Mapping[str, nn.Module]) -> dict[str, Inputs]:
    """By layer, a random input of every size and layout that it gets, and how often."""
    seen: dict[str, Counter] = {}

    def add(name: str, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        seen.setdefault(name, Counter())[tuple(x.shape), x.dtype, x.device, channels_last] += 1

    watch(model, example_input, layers, add)
    return {name: [(_random_tensor(*kind), count) for kind, count in kinds.items()] for name, kinds in seen.items()}


def _random_tensor(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, channels_last: bool = False
) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # the caller's random state stays as it is
    x = torch.randn(shape, generator=generator, device="cpu").to(device, dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def _medians(variants: Mapping[Any, nn.Module], inputs: Inputs, budget: float) -> dict[Any, int]:
    """Median nanoseconds of every variant, sampled in turn so that a slow moment meets them all."""
    samples: dict[Any, list[int]] = {key: [] for key in variants}
    with torch.no_grad():
        for module in [*variants.values()] * 2:  # warm: threads, packed factors, the library's own caches
            _nanoseconds(module, inputs)
        end = time.perf_counter() + budget
        for taken in range(_MOST_SAMPLES):
            if taken >= _LEAST_SAMPLES and time.perf_counter() >= end:
                break
            for key, module in variants.items():
                samples[key].append(_nanoseconds(module, inputs))
    return {key: max(round(median(values)), 1) for key, values in samples.items()}


def _nanoseconds(module: nn.Module, inputs: Inputs) -> int:
    """Of one pass of ``module`` over ``inputs``."""
    on_cuda = any(p.is_cuda for p in module.parameters())
    if on_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter_ns()
    for batch, count in inputs:
        for _ in range(count):
            run(module, batch)
    if on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter_ns() - start
