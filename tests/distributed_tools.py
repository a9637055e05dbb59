"""What the checks of `distributed_worker.py` share: their register, models, and comparisons with one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import numpy_reference
import torch
import torch.distributed as dist
from conftest import assert_close_rel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from smoothk import SmoothnessPenalty

CHECKS: dict[str, tuple[Callable[[], None], tuple[int, ...]]] = {}
BOTH = {"first_order": 0.5, "second_order": 0.25}
NORMS = ("l2", "l1", "l21", "huber")


class Skipped(Exception):
    """What a check needs is not there."""


def on(*worlds: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a check to run with these numbers of processes."""

    def register(check: Callable[[], None]) -> Callable[[], None]:
        CHECKS[check.__name__] = check, worlds
        return check

    return register


def line_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() > 1]


def odd_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Rows: 10, 5, 13, 7, 3, 2 and 1. Over 4 ranks shards of 3, 3, 3, 1, of 2, 2, 1, 0, of 1, 1, 0, 0, ..."""
    linear = (nn.Linear(4, rows) for rows in (13, 7, 3, 2, 1))
    return nn.Sequential(nn.Conv2d(3, 10, 3), nn.Conv1d(4, 5, 2), *linear).to(dtype)


def expected(weights: Sequence[Tensor], options: dict) -> tuple[float, list[Tensor]]:
    """Value and gradients of `SmoothnessPenalty` without the nuclear norm, of whole weights, by NumPy."""
    dim = options.get("dim", 0)
    shared = {
        "dim": (dim,) if isinstance(dim, int) else dim,
        "norm": options.get("norm", "l2"),
        "normalized": options.get("normalized", False),
    }
    arrays = [weight.double().numpy() for weight in weights]
    value, gradients = 0.0, [torch.zeros(weight.shape, dtype=torch.float64) for weight in weights]
    for order, name in ((1, "first_order"), (2, "second_order")):
        term, parts = numpy_reference.difference_penalty(arrays, order, **shared)
        value += options[name] * term
        gradients = [g + options[name] * torch.from_numpy(part) for g, part in zip(gradients, parts, strict=True)]
    return value, gradients


def own_chunk(whole: Tensor, axis: int = 0) -> Tensor:
    chunks = whole.chunk(dist.get_world_size(), axis)
    rank = dist.get_rank()
    return chunks[rank] if rank < len(chunks) else whole.narrow(axis, 0, 0)


def both_ways(penalty: SmoothnessPenalty, weights: Sequence[DTensor]) -> Iterator[Tensor]:
    """The value by autograd and by accumulation, each with fresh gradients in the weights."""

    def differentiate() -> Tensor:
        value = penalty()
        value.backward()
        return value.detach()

    for call in (differentiate, penalty.accumulate_grad):
        for weight in weights:
            weight.grad = None
        yield call()


def check_both_ways(weights: Sequence[DTensor], whole: Sequence[Tensor], options: dict) -> list[Tensor]:
    """Compare with one process; returns the two values."""
    value, gradients = expected(whole, options)
    values = []
    for actual in both_ways(SmoothnessPenalty(weights, **options), weights):
        values.append(actual)
        assert_close_rel(actual, value, torch.float64)
        for weight, wanted in zip(weights, gradients, strict=True):
            if weight.grad is None:  # a weight too short
                assert not wanted.any()
                continue
            assert weight.grad.placements == weight.placements and weight.grad.device_mesh == weight.device_mesh
            assert_close_rel(weight.grad.full_tensor(), wanted, torch.float64)
    return values


def assert_same_on_all_ranks(tensor: Tensor) -> None:
    """Bit for bit."""
    every = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(every, tensor.contiguous())
    assert all(torch.equal(tensor, other) for other in every)


@contextmanager
def recorded_sizes() -> Iterator[list[int]]:
    """Bytes that this process hands to each all-to-all."""
    sizes, original = [], dist.all_to_all_single

    def record(output: Tensor, input: Tensor, *args, **kwargs) -> None:
        sizes.append(input.numel() * input.element_size())
        original(output, input, *args, **kwargs)

    with mock.patch.object(dist, "all_to_all_single", record):
        yield sizes
