"""`smoothk.difference_penalty`: every backend over one case table, against NumPy float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import numpy_reference
import pytest
import torch
from conftest import assert_close_rel
from torch import Tensor

import smoothk
from smoothk.backend import triton_device, unavailable_reason
from smoothk.functional import NORMS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BACKEND_DTYPES = [
    *product(("torch", "cpp"), DTYPES),
    ("triton", torch.float64),  # the others in test_difference_triton.py
]
OPTIONS = list(product((1, 2), NORMS, (False, True)))  # order, norm, normalized
DIMS = (0, 1, -1, (0, 1), (2, -3, 7))
# Long and short along every axis: a kernel, a linear weight, vectors, one and two rows, a third-order tensor, a scalar,
# and tensors without entries.
SHAPES = ((5, 3, 3, 2), (7, 4), (6,), (1, 4), (2, 3), (3, 2, 4), (1,), (), (0, 3), (4, 0))


@pytest.fixture(params=["torch", "cpp", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return available(request.param)


@pytest.fixture(params=["torch", "cpp"])
def fast_backend(request: pytest.FixtureRequest) -> str:
    """Not Triton, whose interpreter takes milliseconds for a tile."""
    return available(request.param)


@pytest.fixture
def device(backend: str) -> str:
    return device_of(backend)


def device_of(backend: str | None) -> str:
    return triton_device() if backend == "triton" else "cpu"


def available(name: str) -> str:
    reason = unavailable_reason(name)
    if reason is not None:
        pytest.skip(reason)
    return name


def random_weights(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).mul(1.5).to(dtype).requires_grad_() for shape in shapes]


def as_tuple(dim: int | tuple[int, ...]) -> tuple[int, ...]:
    return (dim,) if isinstance(dim, int) else dim


def to_numpy(weights: Sequence[Tensor]) -> list[np.ndarray]:
    return [weight.detach().double().cpu().numpy() for weight in weights]


def check(weights: Sequence[Tensor], dtype: torch.dtype, backend: str | None, order: int = 1, **options) -> None:
    """Value and gradients of one call against NumPy, and their dtypes."""
    expected, gradients = numpy_reference.difference_penalty(
        to_numpy(weights), order, **{**options, "dim": as_tuple(options.get("dim", 0))}
    )
    weights = [weight.detach().to(device_of(backend)).requires_grad_() for weight in weights]
    value = smoothk.difference_penalty(weights, order, backend=backend, **options)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and value.shape == ()
    assert_close_rel(value, expected, torch.float64 if dtype == torch.float64 else torch.float32)
    computed = torch.autograd.grad(value, weights)  # short tensors get zeros
    for gradient, wanted, weight in zip(computed, gradients, weights, strict=True):
        assert gradient.dtype == weight.dtype
        assert_close_rel(gradient, wanted, dtype)


@pytest.mark.parametrize(("order", "norm", "normalized"), OPTIONS)
@pytest.mark.parametrize("dim", DIMS, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES, ids=lambda v: str(v).removeprefix("torch."))
def test_value_and_gradient(
    backend: str, dtype: torch.dtype, dim: int | tuple[int, ...], order: int, norm: str, normalized: bool
) -> None:
    weights = random_weights(dtype)
    check(weights, dtype, available(backend), order, dim=dim, norm=norm, normalized=normalized)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda w: w.to(memory_format=torch.channels_last),
    "transposed": lambda w: w.transpose(0, 1),
    "permuted": lambda w: w.permute(2, 0, 3, 1),
    "strided slice": lambda w: w[::2, :, 1:, ::2],
    "offset by one entry": lambda w: torch.cat([w.new_zeros(1), w.flatten()])[1:].view(w.shape),
    "expanded rows": lambda w: w[:1].expand(6, -1, -1, -1),
    "expanded columns": lambda w: w[:, :1].expand(-1, 3, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "norm", "normalized"), OPTIONS)
def test_layouts(fast_backend: str, layout: str, order: int, norm: str, normalized: bool) -> None:
    base = torch.randn(7, 4, 5, 3, dtype=torch.float64)
    weight = LAYOUTS[layout](base).requires_grad_()
    for dim in (0, 1, (0, -1)):
        check([weight], torch.float64, fast_backend, order, dim=dim, norm=norm, normalized=normalized)


def test_long_sums_keep_their_accuracy(fast_backend: str) -> None:
    # More rows and columns than one tile of the kernel holds.
    weights = [torch.randn(1200, 70, requires_grad=True), torch.randn(40, 2500, requires_grad=True)]
    for order, norm, normalized in OPTIONS:
        check(weights, torch.float32, fast_backend, order, norm=norm, normalized=normalized)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("order", [1, 2])
def test_a_zero_tensor_adds_nothing_when_normalized(backend: str, device: str, order: int, norm: str) -> None:
    weights = [torch.zeros(shape, device=device, requires_grad=True) for shape in ((5, 3), (4, 0))]
    value = smoothk.difference_penalty(weights, order, norm=norm, normalized=True, backend=backend)
    value.backward()
    assert value == 0 and all(torch.equal(w.grad, torch.zeros_like(w)) for w in weights)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("normalized", [False, True])
def test_l1_has_subgradient_zero_where_rows_agree(backend: str, device: str, order: int, normalized: bool) -> None:
    weight = torch.ones(6, 3, dtype=torch.float64, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        smoothk.difference_penalty(weight, order, norm="l1", normalized=normalized, backend=backend), weight
    )
    assert torch.equal(gradient, torch.zeros_like(weight))


@np.errstate(invalid="ignore")  # Triton's interpreter computes with NumPy
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("order", "norm", "normalized"), OPTIONS)
def test_nan_and_inf_come_through(
    backend: str, device: str, order: int, norm: str, normalized: bool, bad: float
) -> None:
    weight = torch.randn(8, 3, dtype=torch.float64, device=device)
    weight[4, 1] = bad
    weight.requires_grad_()
    weights = [torch.ones(3, 2, dtype=torch.float64, device=device), weight]
    value = smoothk.difference_penalty(weights, order, norm=norm, normalized=normalized, backend=backend)
    assert not value.isfinite()
    if np.isnan(bad):
        assert value.isnan()
    (gradient,) = torch.autograd.grad(value, weight)
    if norm == "l2" or normalized or (np.isnan(bad) and norm != "l1"):  # torch's abs has slope 0 at NaN
        assert not gradient[4, 1].isfinite()


@pytest.mark.parametrize(("order", "norm", "normalized"), OPTIONS)
def test_float16_weights_of_a_thousand_do_not_overflow(order: int, norm: str, normalized: bool) -> None:
    weight = torch.randn(64, 96).mul(1e3).to(torch.float16).requires_grad_()  # Σ w² is 1e5 times the largest float16
    if not normalized:
        return check([weight], torch.float16, None, order, norm=norm)
    # The normalised gradient lies below the smallest float16 here: only the value can be right.
    value = smoothk.difference_penalty(weight, order, norm=norm, normalized=True)
    expected, _ = numpy_reference.difference_penalty(to_numpy([weight]), order, norm=norm, normalized=True)
    assert_close_rel(value, expected, torch.float32)
    assert torch.autograd.grad(value, weight)[0].isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "cpp", None])
def test_mixed_dtypes_give_one_float64_sum(backend: str | None) -> None:
    available(backend or "torch")
    weights = [torch.randn(5, 4).to(dtype).requires_grad_() for dtype in (torch.bfloat16, *DTYPES, torch.bfloat16)]
    expected, gradients = numpy_reference.difference_penalty(to_numpy(weights))
    value = smoothk.difference_penalty(weights, backend=backend)
    assert value.dtype == torch.float64
    assert_close_rel(value, expected, torch.float32)
    for weight, gradient, wanted in zip(weights, torch.autograd.grad(value, weights), gradients, strict=True):
        assert_close_rel(gradient, wanted, weight.dtype)


def test_one_tensor_is_a_list_of_one(backend: str, device: str) -> None:
    weight = torch.randn(5, 4, device=device)
    single, listed = (smoothk.difference_penalty(w, backend=backend) for w in (weight, (weight,)))
    assert torch.equal(single, listed)


@pytest.mark.parametrize("backend", ["torch", None])
def test_an_empty_sequence_gives_zero(backend: str | None) -> None:
    value = smoothk.difference_penalty([], backend=backend)
    assert value.shape == () and value.dtype == torch.float32 and value == 0


def test_a_weight_listed_twice_counts_twice(backend: str, device: str) -> None:
    weight = torch.randn(5, 4, dtype=torch.float64, device=device, requires_grad=True)
    check([weight], torch.float64, backend)
    value = smoothk.difference_penalty([weight, weight], backend=backend)
    (gradient,) = torch.autograd.grad(value, weight)
    expected, (wanted,) = numpy_reference.difference_penalty(to_numpy([weight]))
    assert_close_rel(value, 2 * expected, torch.float64)
    assert_close_rel(gradient, 2 * wanted, torch.float64)


def test_only_weights_that_need_a_gradient_get_one(backend: str, device: str) -> None:
    frozen, free = torch.randn(5, 4, device=device), torch.randn(5, 4, device=device, requires_grad=True)
    smoothk.difference_penalty([frozen, free], backend=backend).backward()
    assert frozen.grad is None and free.grad is not None
    assert not smoothk.difference_penalty([frozen], backend=backend).requires_grad


def test_weights_are_not_written(backend: str, device: str) -> None:
    weights = [weight.detach().to(device).requires_grad_() for weight in random_weights(torch.float32)]
    before = [weight.detach().clone() for weight in weights]
    smoothk.difference_penalty(weights, norm="l21", normalized=True, backend=backend).backward()
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


@pytest.mark.parametrize(("order", "norm", "normalized"), [case for case in OPTIONS if case[1] != "l1"])
@pytest.mark.parametrize("dim", [0, (0, 1)], ids=str)
def test_first_and_second_derivatives(
    fast_backend: str, dim: int | tuple[int, ...], order: int, norm: str, normalized: bool
) -> None:
    weights = random_weights(torch.float64, ((4, 3), (5, 1, 2)))

    def penalty(*tensors: Tensor) -> Tensor:
        return smoothk.difference_penalty(
            tensors, order, dim=dim, norm=norm, normalized=normalized, eps=0.1, backend=fast_backend
        )

    assert torch.autograd.gradcheck(penalty, weights)
    assert torch.autograd.gradgradcheck(penalty, weights, fast_mode=True)


def test_the_gradient_scales_with_what_comes_from_above(backend: str, device: str) -> None:
    weight = torch.randn(6, 5, dtype=torch.float64, device=device, requires_grad=True)
    value = smoothk.difference_penalty(weight, backend=backend)
    (gradient,) = torch.autograd.grad(value, weight, retain_graph=True)
    (scaled,) = torch.autograd.grad(value.square(), weight)
    torch.testing.assert_close(scaled, 2 * value.detach() * gradient)


def test_bits_do_not_depend_on_the_run(fast_backend: str) -> None:
    weights = [torch.randn(600, 60, requires_grad=True), torch.randn(8, 4100, requires_grad=True)]

    def bits() -> tuple[bytes, ...]:
        value = smoothk.difference_penalty(weights, 2, norm="l21", normalized=True, backend=fast_backend)
        return tuple(t.detach().numpy().tobytes() for t in (value, *torch.autograd.grad(value, weights)))

    assert len({bits() for _ in range(20)}) == 1


def test_bits_do_not_depend_on_the_threads() -> None:
    weights = [torch.randn(600, 60), torch.randn(8, 4100)]
    values = set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        values.add(smoothk.difference_penalty(weights, backend=available("cpp")).item())
    assert len(values) == 1


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("order", [1, 2])
def test_offsets_beyond_two_to_the_31(backend: str, tmp_path: Path, dim: int, order: int) -> None:
    # A sparse file: the entries between the rows are never touched.
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * 2**30 + 32, dtype=torch.bfloat16)
    weight = storage.as_strided((4, 32), (2**30, 1))
    weight.copy_(torch.randn(4, 32))
    check([weight.requires_grad_()], torch.bfloat16, backend, order, dim=dim)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"weights": [torch.ones(3, dtype=torch.int64)]}, TypeError, r"weights\[0\] must .*got torch.int64"),
        ({"weights": [torch.ones(3), torch.ones(3) * 1j]}, TypeError, r"weights\[1\] must .*complex64"),
        ({"weights": [torch.eye(3).to_sparse()]}, TypeError, r"weights\[0\] must .*sparse"),
        ({"weights": [torch.ones(3), 4.0]}, TypeError, r"weights\[1\] must be a tensor, got float"),
        ({"weights": None}, TypeError, "weights must .*got NoneType"),
        ({"weights": torch.nn.Linear(2, 2)}, TypeError, "weights must .*got Linear"),
        ({"order": 0}, ValueError, "order must be 1 or 2, got 0"),
        ({"order": 3}, ValueError, "order must be 1 or 2, got 3"),
        ({"order": 1.0}, TypeError, "order must be an int, got float"),
        ({"norm": "l3"}, ValueError, "norm must be one of 'l2', 'l1', 'l21', 'huber', got 'l3'"),
        ({"eps": 0.0}, ValueError, "eps must be .*got 0.0"),
        ({"eps": float("nan")}, ValueError, "eps must be .*got nan"),
        ({"eps": "1"}, TypeError, "eps must be a number, got str"),
        ({"dim": ()}, ValueError, "dim must .*got ()"),
        ({"dim": (0, 0)}, ValueError, r"dim must not name an axis twice, got \(0, 0\)"),
        ({"dim": 1.5}, TypeError, "dim must be an int or .*got 1.5"),
        ({"dim": (0, True)}, TypeError, "dim must be an int or"),
        ({"dim": True}, TypeError, "dim must be an int or"),
        ({"backend": "metal"}, ValueError, "backend must be None or one of .*got 'metal'"),
    ],
)
def test_bad_arguments(kwargs: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        smoothk.difference_penalty(**{"weights": [torch.ones(3, 2)], **kwargs})


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("weights", [[], [torch.ones(3, 2)]], ids=["no weight", "one weight"])
def test_a_backend_by_name_runs_or_says_why_not(backend: str, weights: list[Tensor]) -> None:
    if unavailable_reason(backend) is None:
        pytest.skip(f"{backend} is available")
    with pytest.raises(smoothk.BackendUnavailable, match=f"backend '{backend}' cannot run difference_penalty: .+"):
        smoothk.difference_penalty(weights, backend=backend)
