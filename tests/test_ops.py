"""The operators called directly: what `smoothk.difference_penalty` does not show (its case table is there)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import numpy_reference
import pytest
import torch
from conftest import assert_close_rel
from torch import Tensor

from smoothk.backend import KERNEL_DTYPES, unavailable_reason
from smoothk.functional import NORMS

pytestmark = pytest.mark.skipif(unavailable_reason("cpp") is not None, reason=str(unavailable_reason("cpp")))

OPTIONS = list(product(([1], [2], [1, 2]), NORMS, (False, True)))  # orders, norm, normalized
EPS = 1e-8
COEFFICIENTS = torch.tensor([0.25, -0.75], dtype=torch.float64)  # of the orders, as many as there are


def penalty(*args) -> Tensor:
    return torch.ops.smoothk.difference_penalty(*args)


def backward(*args) -> list[Tensor]:
    return torch.ops.smoothk.difference_penalty_backward(*args)


def accumulate(
    grads: list[Tensor], weights: list[Tensor], orders: list[int], *options, coefficients: Tensor | None = None
) -> Tensor:
    if coefficients is None:
        coefficients = COEFFICIENTS[: len(orders)]
    return torch.ops.smoothk.difference_penalty_accumulate_(grads, weights, coefficients, orders, *options)


def expected(
    weights: list[Tensor], orders: list[int], dim: list[int], norm: str, normalized: bool, eps: float = EPS
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The terms of all orders, and for each weight the gradient of their sum with `COEFFICIENTS`."""
    arrays = [weight.detach().double().cpu().numpy() for weight in weights]
    terms = [numpy_reference.difference_penalty(arrays, order, dim, norm, normalized, eps) for order in orders]
    gradients = zip(*(gradients for _, gradients in terms), strict=True)
    combined = [sum(c * g for c, g in zip(COEFFICIENTS.tolist(), each, strict=False)) for each in gradients]
    return np.array([value for value, _ in terms]), combined


def misaligned(tensor: Tensor) -> Tensor:
    """A copy that starts one entry past an aligned address."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def gapped(tensor: Tensor) -> Tensor:
    """A copy whose rows have unused entries between them."""
    wide = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + 3)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {  # of weight and gradient
    "contiguous": (Tensor.contiguous, Tensor.contiguous),
    "channels_last": (lambda t: t.to(memory_format=torch.channels_last),) * 2,
    "transposed": (lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),) * 2,
    "misaligned": (misaligned,) * 2,
    "gapped": (gapped,) * 2,
    "different": (lambda t: t.to(memory_format=torch.channels_last), Tensor.contiguous),
    "gapped gradient": (Tensor.contiguous, gapped),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES["difference_penalty"], ids=str)
@pytest.mark.parametrize(("orders", "norm", "normalized"), OPTIONS)
def test_accumulate_adds_the_scaled_gradient(
    layout: str, dtype: torch.dtype, orders: list[int], norm: str, normalized: bool
) -> None:
    place_weight, place_grad = LAYOUTS[layout]
    # The last has blocks of rows, the one before in half precision.
    shapes = ((7, 5, 3, 3), (1, 4, 2, 2), (33, 2, 1, 17), (3, 14, 5, 13), (20, 3, 23, 19))
    weights = [place_weight(torch.randn(shape).to(dtype)) for shape in shapes]
    for dim in ([0], [-1, 1], [2, 9, -9]):
        before = [torch.randn(shape).to(dtype) for shape in shapes]
        grads = [place_grad(grad.clone()) for grad in before]
        value, gradients = expected(weights, orders, dim, norm, normalized)
        result = accumulate(grads, weights, orders, dim, norm, normalized, EPS)
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and not result.requires_grad
        wanted = COEFFICIENTS[: len(orders)] * torch.as_tensor(value)
        assert_close_rel(result, wanted, torch.float64 if dtype == torch.float64 else torch.float32)
        for grad, start, gradient in zip(grads, before, gradients, strict=True):
            assert_close_rel(grad, start.double() + torch.from_numpy(gradient), dtype)


HALF_DTYPES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_half_precision_weights_take_float32_gradients(dtype: torch.dtype) -> None:
    weight = torch.randn(19, 6).to(dtype)
    for orders, norm, normalized in OPTIONS:
        grad = torch.zeros(19, 6)
        accumulate([grad], [weight], orders, [0, 1], norm, normalized, EPS)
        assert_close_rel(grad, expected([weight], orders, [0, 1], norm, normalized)[1][0], torch.float32)


@pytest.mark.parametrize("dims", [[0], [0, 1]], ids=str)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_half_precision_gradients_are_rounded_to_nearest_even(dtype: torch.dtype, dims: list[int]) -> None:
    # Integers, the same in a row, make the gradient exact, so that only the last rounding is left: of normal numbers,
    # of subnormal ones, to Inf.
    weight = torch.randint(-8, 9, (40, 1)).to(dtype).repeat(1, 300)
    grad = torch.randn(40, 300).mul(torch.logspace(-10, 5, 300)).to(dtype)
    for scale in (2.0, 2.0**-20, 2.0**13):
        terms = [numpy_reference.difference_penalty([weight.double().numpy()], order, dims) for order in (1, 2)]
        exact = scale * terms[0][1][0] + scale / 4 * terms[1][1][0]
        wanted = (grad.float() + torch.from_numpy(exact).float()).to(dtype)
        actual = grad.clone()
        coefficients = torch.tensor([scale, scale / 4], dtype=torch.float64)
        accumulate([actual], [weight], [1, 2], dims, "l2", False, EPS, coefficients=coefficients)
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("dims", [[0], [0, 1]], ids=str)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_every_half_precision_gradient_survives_adding_zero(dtype: torch.dtype, dims: list[int]) -> None:
    grad = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(16, 4096)
    before = grad.clone()
    accumulate([grad], [torch.ones(16, 4096, dtype=dtype)], [1], dims, "l2", False, EPS)
    torch.testing.assert_close(grad, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_every_half_precision_weight_is_read_right(dtype: torch.dtype) -> None:
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1, -1).repeat(9, 1)
    entries = weight[0].float()
    weight[1::2] = 0
    grad = torch.zeros(9, 2**16)
    accumulate([grad], [weight], [1], [0], "l2", False, EPS, coefficients=torch.tensor([0.5], dtype=torch.float64))
    wanted = torch.stack([entries, *[-2 * entries, 2 * entries] * 3, -2 * entries, entries])
    torch.testing.assert_close(grad, wanted, rtol=0, atol=0, equal_nan=True)


def test_backward_is_the_gradient_in_the_strides_of_the_weight() -> None:
    base = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    weights = [LAYOUTS[name][0](base) for name in ("contiguous", "channels_last", "transposed", "misaligned")]
    for orders, norm, normalized in OPTIONS:
        grads = backward(COEFFICIENTS[: len(orders)], weights, orders, [0, 2], norm, normalized, EPS)
        gradients = expected(weights, orders, [0, 2], norm, normalized)[1]
        for grad, weight, gradient in zip(grads, weights, gradients, strict=True):
            assert grad.stride() == weight.stride()
            assert_close_rel(grad, gradient, torch.float64)


def test_a_dim_that_is_missing_or_short_leaves_the_gradient_alone() -> None:
    for orders, norm, normalized in OPTIONS:
        weights = [torch.randn(min(orders), 3), torch.randn(4)]
        grads = [torch.randn(min(orders), 3), torch.randn(4)]
        before = [grad.clone() for grad in grads]
        assert not accumulate(grads[:1], weights[:1], orders, [0], norm, normalized, EPS).any()
        assert not accumulate(grads[1:], weights[1:], orders, [1, -2], norm, normalized, EPS).any()
        assert all(map(torch.equal, grads, before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_empty_weights_take_nothing_from_the_others(dtype: torch.dtype) -> None:
    full = torch.randn(8, 5).to(dtype)
    # Strides that a tensor with entries could not be written through, and that no copy changes.
    empty = [torch.zeros(0, 6, dtype=dtype), torch.zeros(9, 4, dtype=dtype)[::2, :0], full[:1].expand(4, 5)[:, :0]]
    for orders, norm, normalized in OPTIONS:
        for weights in ([*empty, full], [full, *empty]):
            grads = [torch.zeros_like(weight) if weight is full else weight.detach() for weight in weights]
            terms, gradients = expected(weights, orders, [0, 1], norm, normalized)
            result = accumulate(grads, weights, orders, [0, 1], norm, normalized, EPS)
            assert_close_rel(result, COEFFICIENTS[: len(orders)] * torch.as_tensor(terms), torch.float32)
            backwards = backward(COEFFICIENTS[: len(orders)], weights, orders, [0, 1], norm, normalized, EPS)
            for actual in (*zip(grads, gradients, strict=True), *zip(backwards, gradients, strict=True)):
                assert_close_rel(*actual, dtype)


@pytest.mark.parametrize("norm", NORMS)
def test_a_nan_reaches_every_gradient_entry_it_touches(norm: str) -> None:
    weight = torch.randn(9, 4)
    weight[4, 1] = float("nan")
    for order in (1, 2):
        (grad,) = backward(torch.ones(1), [weight], [order], [0], norm, False, EPS)
        rows = torch.arange(4 - order, 5 + order)
        touched = torch.zeros(9, 4, dtype=torch.bool)
        touched[rows, 1] = True
        if norm == "l21":  # a group's length holds every column
            touched[rows] = True
        assert torch.equal(grad.isnan(), touched)


def many_tiles(dtype: torch.dtype) -> list[Tensor]:
    shapes = ((300, 1500), (64, 40, 3, 3), (9, 5000), (40000,), (2, 3))
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES["difference_penalty"], ids=str)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    weights = many_tiles(dtype)
    for orders, norm, normalized in OPTIONS[::5]:  # every norm, both orders, one pass and two
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            grads = [torch.ones_like(weight) for weight in weights]
            value = accumulate(grads, weights, orders, [0, 1], norm, normalized, EPS)
            results.append([value, *grads])
        for result in results[1:]:
            assert all(map(torch.equal, results[0], result))


def test_calls_from_many_threads_do_not_disturb_each_other() -> None:
    weights = many_tiles(torch.float32)

    def call(_: int) -> list[Tensor]:
        grads = [torch.zeros_like(weight) for weight in weights]
        return [accumulate(grads, weights, [1, 2], [0], "l21", True, EPS), *grads]

    with ThreadPoolExecutor(8) as pool:
        first, *others = pool.map(call, range(40))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_offsets_beyond_two_to_the_31() -> None:
    # 6 GiB of which only the rows are ever touched. In a process of its own: a 32-bit offset would end it.
    script = """
import torch, smoothk
from smoothk.backend import unavailable_reason
assert unavailable_reason("cpp") is None
near, far = (torch.empty(size, dtype=torch.bfloat16) for size in (400, 3 * 2**30 + 400))
for order in (1, 2):
    for norm in ("l2", "l1", "l21", "huber"):
        for transpose in (False, True):
            results = []
            torch.manual_seed(0)
            values = torch.randn(4, 32)
            for storage, stride in ((near, 40), (far, 2**30)):
                weight, grad = (storage.as_strided((4, 32), (stride, 1), start) for start in (0, 200))
                weight.copy_(values), grad.zero_()
                views = ([grad.t()], [weight.t()]) if transpose else ([grad], [weight])
                value = torch.ops.smoothk.difference_penalty_accumulate_(
                    *views, torch.ones(1, dtype=torch.float64), [order], [int(transpose)], norm, False, 1e-8
                )
                results.append((value, grad))
            (value, grad), (far_value, far_grad) = results
            assert grad.any() and torch.equal(value, far_value) and torch.equal(grad, far_grad), (order, norm)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


@pytest.mark.parametrize(("orders", "norm", "normalized"), OPTIONS)
def test_accumulate_allocates_no_tensor_of_a_weights_size(orders: list[int], norm: str, normalized: bool) -> None:
    weights = [torch.randn(256, 300), torch.randn(64, 3, 3, 3).to(memory_format=torch.channels_last)]
    grads = [torch.zeros_like(weight) for weight in weights]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        accumulate(grads, weights, orders, [0, 1], norm, normalized, EPS)
    allocated = [event.self_cpu_memory_usage for event in profile.key_averages() if event.self_cpu_memory_usage > 0]
    assert allocated and sum(allocated) <= 64  # the terms that are returned, and bookkeeping of the allocator


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("orders must be 1 or 2, got 3", {"orders": [1, 3]}),
        (r"orders must be \[1\], \[2\] or \[1, 2\]", {"orders": [2, 1]}),
        (r"orders must be \[1\], \[2\] or \[1, 2\]", {"orders": []}),
        ("norm must be one of l2, l1, l21, huber, got l3", {"norm": "l3"}),
        ("dtype must be float32, float64, bfloat16 or float16, got Int", {"weights": [torch.ones(4, 3).int()] * 2}),
        ("weights must have one dtype", {"weights": [torch.ones(4, 3), torch.ones(2, 5).double()]}),
        ("grads must have one tensor per weight, got 1 for 2", {"grads": [torch.ones(4, 3)]}),
        (r"grads\[1\] must have the shape of weights\[1\]", {"grads": [torch.ones(4, 3), torch.ones(5, 2)]}),
        ("grads must have the dtype of the weights", {"grads": [torch.ones(4, 3).double(), torch.ones(2, 5).double()]}),
        ("coefficients must have one float64 or float32 entry per order", {"coefficients": torch.ones(2).double()}),
        ("coefficients must have one float64 or float32 entry per order", {"coefficients": torch.ones(1).int()}),
        ("grads must not share memory", {"weights": [torch.ones(4, 3)] * 2, "grads": [torch.ones(4, 3)] * 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_change_nothing(message: str, change: dict) -> None:
    arguments = {"weights": [torch.randn(4, 3), torch.randn(2, 5)], "grads": [torch.ones(4, 3), torch.ones(2, 5)]}
    arguments |= {"orders": [1], "norm": "l2", "coefficients": torch.ones(1, dtype=torch.float64)} | change
    grads = arguments["grads"]
    before = [grad.clone() for grad in grads]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.smoothk.difference_penalty_accumulate_(
            *(arguments[name] for name in ("grads", "weights", "coefficients", "orders")),
            [0], arguments["norm"], False, EPS,
        )  # fmt: skip
    assert all(map(torch.equal, grads, before))


def test_expanded_gradients_are_refused() -> None:
    grad = torch.zeros(1, 3).expand(4, 3)
    with pytest.raises(RuntimeError, match=r"grads\[0\] must not be an expanded tensor"):
        accumulate([grad], [torch.randn(4, 3)], [1], [0], "l2", False, EPS)
    assert not grad.any()


@pytest.mark.parametrize(("orders", "norm", "normalized"), OPTIONS)
def test_derivatives_of_the_penalty_and_of_its_backward(orders: list[int], norm: str, normalized: bool) -> None:
    free = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)]
    free[1].requires_grad_()
    frozen = torch.randn(3, 4, dtype=torch.float64)

    def value(a: Tensor, b: Tensor) -> Tensor:
        return penalty([a, frozen, b], orders, [0, 1], norm, normalized, 1e-2)

    assert torch.autograd.gradcheck(value, free, fast_mode=True)
    assert torch.autograd.gradgradcheck(value, free, fast_mode=True)


def test_third_derivative() -> None:
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def slope(w: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(penalty([w], [1], [0], "l21", False, 1e-2), w, create_graph=True)
        return grad

    assert torch.autograd.gradgradcheck(slope, [weight], fast_mode=True)


def test_frozen_weights_get_no_gradient() -> None:
    frozen, free = torch.randn(4, 3), torch.randn(4, 3, requires_grad=True)
    terms = penalty([frozen, free, frozen], [1, 2], [0], "l2", False, EPS)
    (terms * COEFFICIENTS).sum().backward()
    assert frozen.grad is None
    assert_close_rel(free.grad, expected([free], [1, 2], [0], "l2", False)[1][0], torch.float32)


@pytest.mark.parametrize("kind", ["contiguous", "transposed", "bfloat16", "requires_grad"])
@pytest.mark.parametrize("name", [f"difference_penalty{part}" for part in ("", "_backward", "_accumulate_")])
def test_opcheck(name: str, kind: str) -> None:
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    weights = [torch.randn(4, 3, 2, 2).to(dtype), torch.randn(3, 5).to(dtype)]
    if kind == "transposed":
        weights = [weight.transpose(0, 1) for weight in weights]
    if kind == "requires_grad" and name != "difference_penalty_accumulate_":  # which has no derivative
        weights = [weight.requires_grad_() for weight in weights]
    first = {
        "difference_penalty": (),
        "difference_penalty_backward": (torch.tensor([2.0, 3.0], requires_grad=kind == "requires_grad"),),
        "difference_penalty_accumulate_": ([torch.ones_like(weight) for weight in weights],),
    }[name]
    last = (COEFFICIENTS,) if name == "difference_penalty_accumulate_" else ()
    arguments = (*first, weights, *last, [1, 2], [0], "l21", True, EPS)
    torch.library.opcheck(getattr(torch.ops.smoothk, name).default, arguments)
