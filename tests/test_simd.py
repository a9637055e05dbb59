"""The kernels' copies for the instruction sets that lie below this machine's best: the case tables once more on each.

Machines without that best set run them, and this one would never.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_low_rank_conv
import torch
from test_low_rank_conv import test_gradients_of_the_kernel, test_values_of_the_kernel  # noqa: F401
from test_ops import (  # noqa: F401
    test_a_nan_reaches_every_gradient_entry_it_touches,
    test_accumulate_adds_the_scaled_gradient,
    test_every_half_precision_gradient_survives_adding_zero,
    test_every_half_precision_weight_is_read_right,
    test_half_precision_gradients_are_rounded_to_nearest_even,
    test_same_bits_for_any_number_of_threads,
)

import smoothk
from smoothk import backend

MISSING = backend.unavailable_reason("cpp")
*BELOW, BEST = [None] if MISSING else backend.extension().simd_sets()
pytestmark = [pytest.mark.skipif(MISSING is not None, reason=str(MISSING)), test_low_rank_conv.pytestmark]


@pytest.fixture(autouse=True, params=BELOW)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    backend.extension().use_simd(request.param)
    yield request.param
    backend.extension().use_simd(BEST)


def test_the_copies_are_used(instruction_set: str) -> None:
    """Each adds in an order of its own: the last bits differ."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(16, 300, 1500, dtype=torch.float64, generator=generator)
    x, v, u = (torch.randn(shape, generator=generator) for shape in ((1, 64, 9, 9), (24, 64, 3, 3), (30, 24, 1, 1)))

    def results() -> list[torch.Tensor]:
        values = [smoothk.difference_penalty(w, dim=(0, 1), backend="cpp") for w in weights]
        return [torch.stack(values), smoothk.low_rank_conv2d(x, v, u, backend="cpp")]

    assert backend.extension().build_info()["simd"] == instruction_set
    ours = results()
    backend.extension().use_simd(BEST)
    assert not any(torch.equal(a, b) for a, b in zip(ours, results(), strict=True))


def test_another_set_is_refused(instruction_set: str) -> None:
    with pytest.raises(ValueError, match="name must be one of simd_sets.*'x86-64-v9'"):
        backend.extension().use_simd("x86-64-v9")
    assert backend.extension().build_info()["simd"] == instruction_set
