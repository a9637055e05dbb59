"""The CUDA operators of the low-rank convolution: on a GPU where there is one, and with the emulated kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close_rel
from emulated_cuda import Device, Emulator, Sizes
from test_low_rank_conv_cuda import CASES, PRECISION, run
from torch import Tensor

import smoothk
from smoothk import backend
from smoothk.backend import unavailable_reason

SCHEMAS = (
    "low_rank_conv_pack(Tensor v, Tensor u, int groups) -> Tensor",
    "low_rank_conv_fused(Tensor input, Tensor packed, Tensor? bias, Tensor? residual, int[] numbers, bool relu, bool "
    "channels_last, bool with_z) -> (Tensor, Tensor)",
)
V, U = (24, 16, 3, 3), (20, 24, 1, 1)
V_SPATIAL, U_SPATIAL = (24, 16, 3, 1), (20, 24, 1, 3)
INPUT, OUTPUT = (2, 16, 6, 7), (2, 20, 6, 7)


@dataclass(frozen=True)
class Ops:
    """Operators and where their tensors have to be."""

    namespace: Any
    device: str

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """An operator, for tensors on the CPU."""

        def run(*arguments: Any) -> Any:
            moved = [each.to(self.device) if isinstance(each, Tensor) else each for each in arguments]
            result = getattr(self.namespace, name)(*moved)
            return result.cpu() if isinstance(result, Tensor) else tuple(each.cpu() for each in result)

        return run


@pytest.fixture(scope="module", params=["emulated", "cuda"])
def ops(request: pytest.FixtureRequest) -> Iterator[Ops]:
    if request.param == "cuda":
        if unavailable_reason("cuda") is not None:
            pytest.skip(str(unavailable_reason("cuda")))
        yield Ops(torch.ops.smoothk, "cuda")
        return
    request.getfixturevalue("emulator")
    library = torch.library.Library("smoothk_emulated", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    yield Ops(torch.ops.smoothk_emulated, "cpu")
    library._destroy()


def call(
    ops: Ops,
    x: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    packed: Tensor | None = None,
    channels_last: bool = True,
    with_z: bool = True,
) -> tuple[Tensor, Tensor]:
    packed = ops.low_rank_conv_pack(v, u, 1) if packed is None else packed
    numbers = [*v.shape, *u.shape, 1, 1, 1, 1, 1, 1, 1, *x.shape[2:]]
    return ops.low_rank_conv_fused(x, packed, bias, residual, numbers, False, channels_last, with_z)


def expected(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> tuple:
    x, v, u, bias, residual = (None if t is None else t.double() for t in (x, v, u, bias, residual))
    pad = (0, 1) if u.shape[3] > 1 else (0, 0)
    z = F.conv2d(x, v, padding=(1, 1 - pad[1]))
    y = F.conv2d(z, u, bias, padding=pad)
    return y if residual is None else y + residual, z


def random(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(size).to(dtype)


def misaligned(tensor: Tensor) -> Tensor:
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].as_strided(tensor.shape, tensor.stride())
    return moved.copy_(tensor)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels first": lambda t: t.contiguous(),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "misaligned": lambda t: misaligned(t.contiguous(memory_format=torch.channels_last)),
    "expanded": lambda t: t[:1].expand(t.shape),
    "sliced": lambda t: torch.cat([t, t], -1)[..., ::2],
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shapes", [(V, U), (V_SPATIAL, U_SPATIAL)], ids=["channel", "spatial"])
def test_values_and_layouts(shapes: tuple, dtype: torch.dtype, ops: Ops) -> None:
    x, v, u, bias = (random(*size, dtype=dtype) for size in (INPUT, *shapes, (20,)))
    precision = torch.float16 if dtype == torch.float32 else dtype
    y, z = call(ops, x, v / 12, u / 5, bias)
    for actual, correct in zip((y, z), expected(x, v / 12, u / 5, bias), strict=True):
        assert actual.dtype == dtype and actual.is_contiguous(memory_format=torch.channels_last)
        assert_close_rel(actual, correct, precision)
    assert call(ops, x, v, u, with_z=False)[1].shape == (0,)
    first = call(ops, x, v / 12, u / 5, bias, channels_last=False)[0]
    assert first.is_contiguous() and torch.equal(first, y)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_layout(layout: str, ops: Ops) -> None:
    arrange = LAYOUTS[layout]
    x, v, u, residual = (
        arrange(random(*INPUT)),
        arrange(random(*V) / 12),
        arrange(random(*U) / 5),
        arrange(random(*OUTPUT)),
    )
    bias = random(40)[::2]
    y, z = call(ops, x, v, u, bias, residual)
    for actual, correct in zip((y, z), expected(x, v, u, bias, residual), strict=True):
        assert_close_rel(actual, correct, torch.bfloat16)


def test_an_empty_batch(ops: Ops) -> None:
    y, z = call(ops, random(0, *INPUT[1:]), random(*V), random(*U))
    assert y.shape == (0, 20, 6, 7) and z.shape == (0, 24, 6, 7)


def test_what_would_read_outside_of_memory_is_refused(ops: Ops) -> None:
    x, v, u = random(*INPUT), random(*V), random(*U)
    packed = ops.low_rank_conv_pack(v, u, 1)
    for message, change in {
        "packed must be": {"packed": packed[1:]},
        "packed must be on": {"packed": packed.float()},
        "input must be": {"x": random(2, 17, 6, 7)},
        "bias must be": {"bias": random(21)},
        "bias must be on": {"bias": random(20, dtype=torch.float32)},
        "residual must be": {"residual": random(*INPUT)},
        "v and u must be": {"u": random(20, 23, 1, 1), "packed": packed},
        "dtype must be": {"x": x.double(), "packed": packed},
        "does not take this case": {"x": random(2, 12, 6, 7), "v": random(24, 12, 3, 3)},
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call(ops, **{"x": x, "v": v, "u": u, **change})
    with pytest.raises(RuntimeError, match="u must be on the input's device, of its dtype"):
        ops.low_rank_conv_pack(v, u.float(), 1)


def test_the_case_table_of_the_emulation(ops: Ops) -> None:
    """All of it on a GPU."""
    for case in CASES if ops.device == "cuda" else CASES[::12]:
        output, z, expected, expected_z = run(ByOperator(ops), case)
        assert_close_rel(output, expected, PRECISION[case.dtype])
        if case.with_z:
            assert_close_rel(z, expected_z, PRECISION[case.dtype])


@dataclass(frozen=True)
class ByOperator:
    """In the place of an `emulated_cuda.Emulator`."""

    ops: Ops

    def pack(self, sizes: Sizes, v: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return v, u

    def low_rank_conv(
        self,
        sizes: Sizes,
        input: Tensor,
        factors: tuple[Tensor, Tensor],
        bias: Tensor | None,
        residual: Tensor | None,
        relu: bool,
        output: Tensor,
        z: Tensor | None,
        *_: Any,
    ) -> None:
        numbers = [size for factor in factors for size in factor.shape] + [1]
        numbers += [sizes.stride_h, sizes.stride_w, sizes.pad_h, sizes.pad_w]
        numbers += [sizes.dilation_h, sizes.dilation_w, sizes.out_height, sizes.out_width]
        packed = self.ops.low_rank_conv_pack(*factors, 1)
        found, found_z = self.ops.low_rank_conv_fused(input, packed, bias, residual, numbers, relu, True, z is not None)
        output.copy_(found)
        if z is not None:
            z.copy_(found_z)


# By the name of what is wrong with them: factors, input, groups.
REFUSED = {
    "rank": ((129, 16, 3, 3), (20, 129, 1, 1), INPUT, 1),
    "channels": ((24, 12, 3, 3), U, (2, 12, 6, 7), 1),
    "groups": ((24, 8, 3, 3), (20, 12, 1, 1), INPUT, 2),
}


@pytest.fixture
def planned(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Has the CPU taken for a GPU on which the launcher's own plan decides; what it was asked for ``with_z``."""
    asked: list[bool] = []

    def blocks(v: Any, u: Any, x: Any, *numbers: Any) -> int:
        stride, pad, dilation, out, groups, dtype, with_z, *device = numbers
        asked.append(with_z)
        kernel = v[2], u[3] if u[3] > 1 else v[3]
        sizes = Sizes(x[0], groups, x[1], u[1], u[0], *x[2:], *out, *kernel, *stride, *pad, *dilation, u[3] > 1)
        plan = emulator.plan(sizes, getattr(torch, dtype), with_z, Device(*device))
        return plan[3] if plan else 0

    properties = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=232448)
    monkeypatch.setitem(sys.modules, "smoothk._C_cuda", SimpleNamespace(low_rank_conv_blocks=blocks))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(backend, "choose", lambda op, name, tensors: name or "cuda")
    return asked


@pytest.mark.skipif(unavailable_reason("cpp") is not None, reason="its kernel stands in for the one on CUDA")
def test_what_the_launcher_would_refuse_is_refused_before_or_left_to_the_library(planned: list[bool]) -> None:
    x, v, u = random(*INPUT), random(*V) / 12, random(*U) / 5
    taken = smoothk.low_rank_conv2d(x, v, u, padding=1, backend="cuda")
    assert_close_rel(taken, expected(x, v, u)[0], torch.bfloat16)
    assert planned == [False]
    smoothk.low_rank_conv2d(x, v.requires_grad_(), u, padding=1, backend="cuda")
    assert planned == [False, True]
    for v_shape, u_shape, size, groups in REFUSED.values():
        x, v, u = random(*size), random(*v_shape) / 12, random(*u_shape) / 5
        message = rf"cannot run low_rank_conv: its kernel takes ranks .* got v \[{v_shape[0]}, .* groups {groups}"
        with pytest.raises(smoothk.BackendUnavailable, match=message):
            smoothk.low_rank_conv2d(x, v, u, padding=1, groups=groups, backend="cuda")
        left = smoothk.low_rank_conv2d(x, v, u, padding=1, groups=groups, method="fused")
        assert torch.equal(left, smoothk.low_rank_conv2d(x, v, u, padding=1, groups=groups, backend="torch"))
    assert smoothk.low_rank_conv2d(random(0, *size[1:]), v, u, padding=1, groups=2, backend="cuda").shape[0] == 0
