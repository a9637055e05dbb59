"""Every operator of smoothk: torch's checks of it, and the same bits from eight threads at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from smoothk.backend import unavailable_reason

UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
OPTIONS = ([1, 2], [0, 1], "l21", True, 1e-8)
COEFFICIENTS = torch.tensor([0.25, -0.75], dtype=torch.float64)


def weights() -> list[Tensor]:
    return [torch.randn(7, 5, 3, 3), torch.randn(6, 9).t()]


def conv_factors() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 4, 3, 1), torch.randn(12, 3, 1, 3)


CONV = ([2, 1], [1, 2], [1, 2], 2)  # stride, padding, dilation, groups


def fused() -> tuple[Any, ...]:
    v, u = conv_factors()
    packed = torch.ops.smoothk.low_rank_conv_pack(v, u, 2)
    stride, padding, dilation, groups = CONV
    numbers = [*v.shape, *u.shape, groups, *stride, *padding, *dilation, 4, 6]
    return torch.randn(2, 8, 7, 6), packed, torch.randn(12), torch.randn(2, 12, 4, 6), numbers, True, True, True


# name: how its arguments are made. Triton's interpreter, which patches its own module in a call, runs one at a time.
ARGUMENTS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "smoothk::difference_penalty": lambda: (weights(), *OPTIONS),
    "smoothk::difference_penalty_backward": lambda: (COEFFICIENTS.float(), weights(), *OPTIONS),
    "smoothk::difference_penalty_accumulate_": lambda: (
        [torch.ones_like(weight) for weight in weights()],
        weights(),
        COEFFICIENTS,
        *OPTIONS,
    ),
    "smoothk::low_rank_conv_pack": lambda: (*conv_factors(), 2),
    "smoothk::low_rank_conv_fused": fused,
    "smoothk_torch::low_rank_conv": lambda: (
        torch.randn(2, 8, 7, 6),
        *conv_factors(),
        torch.randn(12),
        torch.randn(2, 12, 4, 6),
        *CONV,
        "fused",
        True,
        True,
    ),
    "smoothk_torch::polar_factors": lambda: (weights(), "spatial", "auto"),
}
CPP = [name for name in ARGUMENTS if name.startswith("smoothk::")]


@pytest.fixture(autouse=True)
def loaded() -> None:
    for name in ("cpp", "torch"):  # which defines their operators
        unavailable_reason(name)


def call(name: str, arguments: tuple[Any, ...]) -> Any:
    namespace, _, op = name.partition("::")
    return getattr(getattr(torch.ops, namespace), op)(*arguments)


def skip_without_extension(name: str) -> None:
    reason = unavailable_reason("cpp")
    if reason is not None and (name in CPP or name == "smoothk_torch::low_rank_conv"):
        pytest.skip(reason)


def test_the_table_is_complete() -> None:
    spaces = "smoothk::", "smoothk_torch::", "smoothk_triton::"  # other tests define operators in others
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith(spaces)}
    triton = {name for name in names if name.startswith("smoothk_triton::")}  # checked in the tests of its kernels
    expected = set(ARGUMENTS) if unavailable_reason("cpp") is None else {"smoothk_torch::polar_factors"}
    assert names - triton == expected
    assert triton <= {f"smoothk_triton::{name.partition('::')[2]}" for name in ARGUMENTS}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_torchs_checks(name: str) -> None:
    skip_without_extension(name)
    namespace, _, op = name.partition("::")
    results = torch.library.opcheck(
        getattr(getattr(torch.ops, namespace), op).default, ARGUMENTS[name](), test_utils=UTILITIES
    )
    assert results == dict.fromkeys(UTILITIES, "SUCCESS")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_hundred_calls_from_each_of_eight_threads_have_the_same_bits(name: str) -> None:
    skip_without_extension(name)
    shared = ARGUMENTS[name]()

    def flat(value: Any) -> list[Tensor]:
        return [value] if isinstance(value, Tensor) else [tensor for part in value for tensor in flat(part)]

    def once() -> list[Tensor]:
        arguments = shared
        if name.endswith("_accumulate_"):  # which writes: gradients of its own
            arguments = ([grad.clone() for grad in shared[0]], *shared[1:])
        result = flat(call(name, arguments))
        return [*result, *arguments[0]] if name.endswith("_accumulate_") else result

    wanted = [value.clone() for value in once()]
    bits = [value.contiguous().reshape(-1).view(torch.uint8) for value in wanted]

    def calls(_: int) -> int:
        return sum(
            all(torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b) for a, b in zip(once(), bits, strict=True))
            for _ in range(100)
        )

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(calls, range(8))) == [100] * 8
