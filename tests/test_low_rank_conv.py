"""`smoothk.low_rank_conv1d/2d/3d`: both schemes and every geometry against loops in NumPy float64."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields, replace

import numpy as np
import numpy_reference
import pytest
import torch
from conftest import assert_close_rel
from torch import Tensor

import smoothk
from smoothk.backend import unavailable_reason

# torch says so of its own layers, too.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

cpp_missing = unavailable_reason("cpp")
needs_cpp = pytest.mark.skipif(cpp_missing is not None, reason=str(cpp_missing))
OPS = {1: smoothk.low_rank_conv1d, 2: smoothk.low_rank_conv2d, 3: smoothk.low_rank_conv3d}


@dataclass(frozen=True)
class Case:
    """A geometry; ``kernel`` and ``size`` give the number of axes."""

    kernel: tuple[int, ...]
    size: tuple[int, ...]
    scheme: str = "channel"
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] | str = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    rank: int = 2
    bias: bool = True
    channels: tuple[int, int] = (4, 6)

    def __str__(self) -> str:
        changed = [f for f in fields(self) if f.default is MISSING or getattr(self, f.name) != f.default]
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in changed)

    @property
    def axes(self) -> int:
        return len(self.kernel)

    def per_axis(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        return (value,) * self.axes if isinstance(value, int) else value

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        c_in, c_out = self.channels
        kernel_v, kernel_u = self.kernel, (1,) * self.axes
        if self.scheme == "spatial":
            kernel_v, kernel_u = (self.kernel[0], 1), (1, self.kernel[1])
        x = torch.randn(2, c_in, *self.size, dtype=torch.float64)
        v = torch.randn(self.groups * self.rank, c_in // self.groups, *kernel_v, dtype=torch.float64)
        u = torch.randn(c_out, self.rank, *kernel_u, dtype=torch.float64) / math.sqrt(self.rank)
        bias = torch.randn(c_out, dtype=torch.float64) if self.bias else None
        return tuple(None if t is None else t.to(dtype) for t in (x, v, u, bias))

    def run(self, x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, **options: str) -> Tensor:
        return OPS[self.axes](x, v, u, bias, self.stride, self.padding, self.dilation, self.groups, **options)

    def expected(self, x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None) -> np.ndarray:
        x, v, u, bias = (None if t is None else t.detach().double().numpy() for t in (x, v, u, bias))
        weight = numpy_reference.product_weight(v, u, self.groups, self.scheme)
        assert weight.shape[2:] == self.kernel
        padding = self.padding if isinstance(self.padding, str) else self.per_axis(self.padding)
        return numpy_reference.convolution(
            x, weight, bias, self.per_axis(self.stride), padding, self.per_axis(self.dilation), self.groups
        )


CASES = [
    Case((3,), (9,)),
    Case((4,), (9,), stride=2, padding=1, dilation=2, groups=2),
    Case((4,), (9,), padding="same", dilation=3, bias=False),
    Case((2, 3, 2), (3, 4, 3), padding=(1, 0, 1)),
    Case((2, 1, 3), (4, 3, 5), stride=(2, 1, 2), padding=1, dilation=(1, 2, 1), groups=2, bias=False),
    Case((3, 2, 1), (3, 3, 3), padding="same"),
] + [
    replace(case, scheme=scheme)
    for scheme in ("channel", "spatial")
    for case in (
        Case((3, 3), (5, 6)),
        Case((1, 1), (4, 4)),
        Case((3, 1), (5, 4), padding=(1, 0)),
        Case((1, 3), (5, 4), padding=(0, 1)),
        Case((3, 2), (6, 7), stride=(2, 3), padding=(1, 2), dilation=(2, 1), bias=False),
        Case((2, 4), (5, 7), stride=2, padding=2, dilation=(1, 2), groups=2),
        Case((3, 3), (5, 5), padding=1, groups=4, rank=1, channels=(4, 8)),
        Case((2, 3), (5, 6), padding="same", dilation=2),
        Case((4, 2), (5, 6), padding="same", groups=2),
        Case((3, 3), (4, 4), padding="valid"),
        Case((3, 3), (6, 5), rank=7),
        Case((3, 3), (1, 1), padding=1),
    )
]


KERNEL_CASES = [case for case in CASES if case.axes < 3] + [
    replace(case, scheme=scheme, channels=channels)
    for scheme in ("channel", "spatial")
    for channels, case in (
        ((24, 40), Case((3, 3), (9, 11), padding=1, rank=16)),
        ((17, 33), Case((3, 3), (8, 8), padding=1, rank=19)),
        ((36, 66), Case((3, 3), (13, 6), stride=2, padding=1, groups=2, rank=13)),
        ((16, 70), Case((1, 1), (20, 3), rank=9)),
        ((8, 130), Case((5, 3), (7, 40), padding=2, rank=7, dilation=(1, 2))),
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("method", ["auto", "pair", "merged"])
def test_values(case: Case, dtype: torch.dtype, method: str) -> None:
    tensors = case.tensors(dtype)
    assert_close_rel(case.run(*tensors, method=method), case.expected(*tensors), dtype)


@needs_cpp
@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_values_of_the_kernel(case: Case, layout: torch.memory_format) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, *factors = case.tensors(dtype)
        if case.axes == 2:
            x = x.to(memory_format=layout)
        y = case.run(x, *factors, backend="cpp")
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=layout if case.axes == 2 else torch.contiguous_format)
        wide = (None if t is None else t.double() for t in (x, *factors))
        assert_close_rel(y, case.run(*wide, backend="torch"), dtype)


@needs_cpp
@pytest.mark.parametrize(("kernel", "stride"), [(2, 3), (2, 5), (3, 7)])
def test_strides_that_leave_out_rows_of_several_images(kernel: int, stride: int) -> None:
    v, u = torch.randn(20, 24, kernel, 2), torch.randn(30, 20, 1, 1)
    for batch in (1, 2, 3, 8):
        x = torch.randn(batch, 24, 17, 9)
        y = smoothk.low_rank_conv2d(x, v, u, stride=(stride, 1), backend="cpp")
        wide = smoothk.low_rank_conv2d(x.double(), v.double(), u.double(), stride=(stride, 1))
        assert_close_rel(y, wide, torch.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_the_product(case: Case) -> None:
    """The derivative along a direction, by the central difference of the NumPy loops."""
    tensors = [t.requires_grad_() for t in case.tensors() if t is not None]
    directions = [torch.randn_like(t) for t in tensors]

    def loops(step: float) -> np.ndarray:
        moved = [t.detach() + step * d for t, d in zip(tensors, directions, strict=True)]
        return case.expected(*moved, *([None] if not case.bias else []))

    y = case.run(*tensors, *([None] if not case.bias else []))
    above = torch.randn_like(y)
    gradients = torch.autograd.grad(y, tensors, above)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    expected = float(np.sum(above.numpy() * (loops(1e-4) - loops(-1e-4)))) / 2e-4
    assert slope.item() == pytest.approx(expected, rel=1e-6, abs=1e-5)


@needs_cpp
@pytest.mark.parametrize("case", [case for case in CASES if case.axes < 3], ids=str)
def test_gradients_of_the_kernel(case: Case) -> None:
    """They are those of the two convolutions, in float32."""
    tensors = [t.requires_grad_() for t in case.tensors(torch.float32) if t is not None]
    rest = [None] if not case.bias else []
    expected = [t.detach().double().requires_grad_() for t in tensors]
    y, wide = case.run(*tensors, *rest, backend="cpp"), case.run(*expected, *rest)
    above = torch.randn_like(y)
    first = torch.autograd.grad(y, tensors, above, create_graph=True)
    wide_first = torch.autograd.grad(wide, expected, above.double(), create_graph=True)
    for gradient, wanted in zip(first, wide_first, strict=True):
        assert_close_rel(gradient, wanted, torch.float32)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), tensors, allow_unused=True)
    wide_second = torch.autograd.grad(sum(g.square().sum() for g in wide_first), expected, allow_unused=True)
    for gradient, wanted in zip(second, wide_second, strict=True):
        assert (gradient is None) == (wanted is None)
        if gradient is not None:
            torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("case", [c for c in CASES if c.groups == 2], ids=str)
def test_first_and_second_derivatives(case: Case) -> None:
    tensors = [t.requires_grad_() for t in replace(case, bias=True).tensors()]
    assert torch.autograd.gradcheck(case.run, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(case.run, tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    # Rounded twice: the intermediate and the output have the dtype of the factors.
    for case in CASES:
        tensors = case.tensors(dtype)
        y = case.run(*tensors)
        assert y.dtype == dtype
        expected = torch.from_numpy(case.expected(*tensors))
        error = (y.double() - expected).norm() / expected.norm()
        assert error < 2 * torch.finfo(dtype).eps, case


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_input_without_batch(case: Case) -> None:
    x, *rest = case.tensors()
    torch.testing.assert_close(case.run(x[0], *rest), case.run(x, *rest)[0])


def test_layouts_of_the_input() -> None:
    for case in CASES:
        x, v, u, bias = case.tensors()
        expected = case.run(x, v, u, bias)
        strided = torch.stack([x, x], -1)[..., 0]
        transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
        expanded = x[:1].expand(2, *x.shape[1:])
        torch.testing.assert_close(case.run(strided, v, u, bias), expected)
        torch.testing.assert_close(case.run(transposed, v, u, bias), expected)
        torch.testing.assert_close(case.run(expanded, v, u, bias)[1], expected[0])


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_channels_last_is_kept(scheme: str) -> None:
    case = Case((3, 3), (6, 5), scheme, padding=1)
    x, v, u, bias = case.tensors(torch.float32)
    y = case.run(x.to(memory_format=torch.channels_last), v, u, bias)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close_rel(y, case.expected(x, v, u, bias), torch.float32)


def test_both_readings_of_factors_without_width_agree() -> None:
    # v [r, C, k_h, 1] with u [C_out, r, 1, 1] spells either scheme.
    for case in (
        Case((3, 1), (7, 5), stride=(2, 3), padding=(1, 2), dilation=(2, 1)),
        Case((3, 1), (6, 5), padding="same", groups=2),
    ):
        tensors = case.tensors()
        expected = [replace(case, scheme=scheme).expected(*tensors) for scheme in ("channel", "spatial")]
        np.testing.assert_allclose(*expected)
        assert_close_rel(case.run(*tensors), expected[0], torch.float64)


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_an_empty_batch(scheme: str) -> None:
    case = Case((3, 3), (5, 6), scheme, padding=1)
    x, v, u, bias = case.tensors()
    for method in ("auto", "pair", "merged", "fused"):
        for dtype in (torch.float32, torch.float64):
            tensors = (None if t is None else t.to(dtype) for t in (x[:0], v, u, bias))
            assert case.run(*tensors, method=method).shape == (0, 6, 5, 6)


X, V, U = (2, 4, 5, 5), (3, 4, 3, 3), (6, 3, 1, 1)  # shapes that fit each other


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"v": (3, 4, 3)}, ValueError, r"v must have 4 dimensions for a 2d convolution, got \[3, 4, 3\]"),
        ({"u": (6, 3)}, ValueError, r"u must have 4 dimensions .*got \[6, 3\]"),
        ({"input": (4, 5)}, ValueError, r"input must have 3 or 4 dimensions, got \[4, 5\]"),
        ({"input": (2, 5, 5, 5)}, ValueError, r"input must have .*4 channels .*got input \[2, 5, 5, 5\]"),
        ({"v": (4, 4, 3, 3)}, ValueError, r"v must have .*3 rows .*got v \[4, 4, 3, 3\]"),
        ({"u": (6, 3, 1, 3)}, ValueError, r"u must be .*got u \[6, 3, 1, 3\] and v \[3, 4, 3, 3\]"),
        ({"u": (6, 3, 3, 1)}, ValueError, r"u must be .*got u \[6, 3, 3, 1\]"),
        ({"v": (0, 4, 3, 3), "u": (6, 0, 1, 1)}, ValueError, r"v must not be empty, got \[0, 4, 3, 3\]"),
        ({"v": (3, 4, 0, 3)}, ValueError, r"v must not be empty, got \[3, 4, 0, 3\]"),
        ({"u": (0, 3, 1, 1)}, ValueError, r"u must not be empty, got \[0, 3, 1, 1\]"),
        ({"bias": (5,)}, ValueError, r"bias must have shape \[6\], got \[5\]"),
        ({"groups": 0}, ValueError, "groups must be a positive int, got 0"),
        ({"groups": 1.0}, TypeError, "groups must be an int, got float"),
        ({"groups": 4, "v": (12, 1, 3, 3)}, ValueError, "u must have a multiple of groups=4 rows"),
        ({"stride": 0}, ValueError, "stride must be .*at least 1, got 0"),
        ({"stride": (1, 2, 3)}, ValueError, r"stride must be an int or 2 ints.*got \(1, 2, 3\)"),
        ({"stride": 1.5}, TypeError, "stride must be an int or 2 ints, got 1.5"),
        ({"dilation": (1, 0)}, ValueError, r"dilation must be .*got \(1, 0\)"),
        ({"padding": -1}, ValueError, "padding must be .*at least 0, got -1"),
        ({"padding": "full"}, ValueError, "padding must be 'same', 'valid'.*got 'full'"),
        ({"padding": "same", "stride": 2}, ValueError, "padding 'same' needs stride 1, got stride 2"),
        ({"backend": "metal"}, ValueError, "backend must be None or one of"),
        ({"method": "fast"}, ValueError, "method must be one of 'auto', 'fused', 'pair', 'merged', got 'fast'"),
        ({"dilation": 3}, ValueError, r"input must be at least as large .*padded it has size \[5, 5\], .*7"),
    ],
)
def test_bad_arguments(changes: dict, error: type[Exception], message: str) -> None:
    arguments: dict = {"input": X, "v": V, "u": U, **changes}
    for name in ("input", "v", "u", "bias"):
        if name in arguments:
            arguments[name] = torch.zeros(arguments[name])
    with pytest.raises(error, match=message):
        smoothk.low_rank_conv2d(**arguments)


def test_a_number_of_another_type_is_refused_after_its_equal() -> None:
    x, v, u = map(torch.zeros, (X, V, U))
    smoothk.low_rank_conv2d(x, v, u, stride=1)
    for stride in (1.0, True):
        with pytest.raises(TypeError, match=f"stride must be an int or 2 ints, got {stride}"):
            smoothk.low_rank_conv2d(x, v, u, stride=stride)


def test_factors_must_be_floating_point() -> None:
    for name, dtype in (("v", torch.int32), ("u", torch.complex64)):
        tensors = {"input": torch.zeros(X), "v": torch.zeros(V), "u": torch.zeros(U)}
        tensors[name] = tensors[name].to(dtype)
        with pytest.raises(TypeError, match=f"{name} must have a real floating-point dtype, got {dtype}"):
            smoothk.low_rank_conv2d(**tensors)
    with pytest.raises(TypeError, match="v must be a tensor, got NoneType"):
        smoothk.low_rank_conv2d(torch.zeros(X), None, torch.zeros(U))


def test_other_than_tensors_of_one_dtype_are_named() -> None:
    x, v, u = torch.randn(1, 3, 5, 5), torch.randn(2, 3, 3, 3), torch.randn(4, 2, 1, 1)
    with pytest.raises(TypeError, match="bias must be a tensor, got list"):
        smoothk.low_rank_conv2d(x, v, u, bias=[1, 2, 3, 4])
    with pytest.raises(TypeError, match="one dtype outside autocast, got torch.float32, torch.float64"):
        smoothk.low_rank_conv2d(x.double(), v, u)
