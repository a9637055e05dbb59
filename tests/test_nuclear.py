"""`smoothk.nuclear_norm`: both unfoldings and every method against NumPy's SVD in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy_reference
import pytest
import torch
from conftest import assert_close_rel
from torch import Tensor

import smoothk
from smoothk import polar
from smoothk.backend import unavailable_reason
from smoothk.polar import METHODS
from smoothk.unfolding import UNFOLDINGS, fold, matrix_shape, unfold

# Linear and 1-d to 3-d kernels; tall, wide and square matrices in either unfolding; one row and one column.
SHAPES = ((6, 4), (4, 6), (5, 5), (9, 2, 3), (3, 2, 5, 3), (8, 3, 1, 2), (2, 3, 2, 2, 2), (1, 7), (7, 1))
# The tolerance of a singular value decomposition in the dtype, and what `polar` promises where it resolves everything.
EXACT = {torch.float64: 1e-12, torch.float32: 2e-5}
VALUE_ERROR, GRADIENT_ERROR = 1e-3, 1e-2  # of "auto", on any spectrum


def value_and_gradient(weight: Tensor, **options: str) -> tuple[Tensor, Tensor]:
    leaf = weight.detach().requires_grad_()
    value = smoothk.nuclear_norm(leaf, **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def relative_error(actual: Tensor, expected: np.ndarray | float) -> float:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    return float((actual.double() - expected).norm() / expected.norm())


def with_spectrum(spectrum: Tensor, rows: int, columns: int) -> Tensor:
    """Random float64 matrix with these singular values."""
    u = torch.linalg.qr(torch.randn(rows, len(spectrum), dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, len(spectrum), dtype=torch.float64))[0]
    return u * spectrum.double() @ v.T


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("unfolding", UNFOLDINGS)
def test_unfoldings_are_those_of_the_definition(shape: tuple[int, ...], unfolding: str) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    (matrix,) = unfold(weight, unfolding)
    np.testing.assert_array_equal(matrix.numpy(), numpy_reference.unfold(weight.numpy(), unfolding))
    assert matrix_shape(shape, unfolding) == tuple(matrix.shape)
    assert torch.equal(fold(matrix.unsqueeze(0), shape, unfolding), weight)


@pytest.mark.parametrize("unfolding", UNFOLDINGS)
def test_every_group_unfolds_by_itself(unfolding: str) -> None:
    weight = torch.randn(6, 2, 3, 2, dtype=torch.float64)
    matrices = unfold(weight, unfolding, groups=3)
    for g, matrix in enumerate(matrices):
        expected = numpy_reference.unfold(weight[2 * g : 2 * g + 2].numpy(), unfolding)
        np.testing.assert_array_equal(matrix.numpy(), expected)
    assert matrix_shape(weight.shape, unfolding, groups=3) == tuple(matrices.shape[1:])
    assert torch.equal(fold(matrices, weight.shape, unfolding), weight)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("unfolding", UNFOLDINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_value_and_gradient(method: str, shape: tuple[int, ...], unfolding: str, dtype: torch.dtype) -> None:
    rows, columns = matrix_shape(shape, unfolding)
    matrix = with_spectrum(torch.linspace(0.5, 2, min(rows, columns)), rows, columns)
    weight = fold(matrix.unsqueeze(0), shape, unfolding).to(dtype)
    expected, wanted = numpy_reference.nuclear_norm(weight.double().numpy(), unfolding)
    value, gradient = value_and_gradient(weight, unfolding=unfolding, method=method)
    assert value.dtype == gradient.dtype == dtype and value.shape == ()
    tolerance = 1e-5 if method == "polar" and dtype == torch.float64 else EXACT[dtype]
    assert relative_error(value, expected) < tolerance
    assert relative_error(gradient, wanted) < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_computed_in_float32(method: str, dtype: torch.dtype) -> None:
    weight = with_spectrum(torch.linspace(0.5, 2, 8), 8, 20).mul(1e3).to(dtype)  # Σ w² overflows float16
    expected, wanted = numpy_reference.nuclear_norm(weight.double().numpy())
    value, gradient = value_and_gradient(weight, method=method)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert relative_error(value, expected) < 2e-5
    assert_close_rel(gradient, wanted, dtype)


@pytest.mark.parametrize("unfolding", UNFOLDINGS)
def test_a_vector_counts_as_one_row(unfolding: str) -> None:
    weight = torch.randn(7, dtype=torch.float64)
    value, gradient = value_and_gradient(weight, unfolding=unfolding)
    assert_close_rel(value, weight.norm(), torch.float64)
    assert_close_rel(gradient, weight / weight.norm(), torch.float64)


SPECTRA = {
    "repeated": torch.tensor([2.0, 2, 2, 1, 1, 1]),
    "all equal": torch.ones(6),
    "rank 1": torch.tensor([3.0]),
    "rank 2, repeated": torch.tensor([3.0, 3]),
    "half of them zero": torch.tensor([3.0, 2, 1, 0, 0, 0]),
}


@pytest.mark.parametrize("method", ["svd", "gram", "auto", "polar"])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("size", [(6, 6), (6, 15), (15, 6)], ids=str)
def test_repeated_and_zero_singular_values(method: str, spectrum: str, size: tuple[int, int]) -> None:
    weight = with_spectrum(SPECTRA[spectrum], *size)
    expected, wanted = numpy_reference.nuclear_norm(weight.numpy(), eps=1e-10)
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-3)):
        value, gradient = value_and_gradient(weight.to(dtype), method=method)
        assert gradient.isfinite().all()
        assert relative_error(value, expected) < tolerance
        assert relative_error(gradient, wanted) < (1e-2 if method == "polar" else tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 2, 2), (5,), (0, 3), (3, 0), (2, 0, 3, 3)], ids=str)
def test_zero_and_empty_weights_have_zero_gradient(method: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value, gradient = value_and_gradient(torch.zeros(shape, dtype=dtype), method=method)
    assert value == 0 and torch.equal(gradient, torch.zeros(shape, dtype=dtype))


def slow_spectra(size: int) -> dict[str, Tensor]:
    index = torch.arange(1, size + 1, dtype=torch.float64)
    tail = torch.full((size,), 1e-3, dtype=torch.float64)
    tail[: size // 8] = 1
    return {"1/i": 1 / index, "condition 1e6": torch.logspace(0, -6, size), "low rank and tail": tail}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(48, 160), (160, 48), (64, 64)], ids=str)
@pytest.mark.parametrize("spectrum", ["Gaussian", "1/i", "condition 1e6", "low rank and tail"])
def test_auto_is_accurate_on_any_spectrum(spectrum: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    """Compared with the float64 SVD of the very weight that goes in (rounded to its dtype), whose ``U Vᵀ`` leaves out
    what the contract leaves out: singular values below ``max(rows, columns) * eps * σ_max``, eps that of the dtype
    computed in."""
    if spectrum == "Gaussian":
        matrix = torch.randn(size, dtype=torch.float64)
    else:
        matrix = with_spectrum(slow_spectra(min(size))[spectrum], *size)
    weight = matrix.to(dtype)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    expected, wanted = numpy_reference.nuclear_norm(weight.double().numpy(), eps=eps)
    value, gradient = value_and_gradient(weight)
    assert relative_error(value, expected) <= VALUE_ERROR
    assert relative_error(gradient, wanted) <= GRADIENT_ERROR


# Both more entries than "auto" leaves to float64; square ones always hold directions that float32 does not resolve, and
# 520 rows are multiplied in blocks.
LARGE = ((72, 640), (640, 72), (230, 231), (520, 600))


def hard_spectra(rows: int, columns: int) -> dict[str, Tensor]:
    """Spectra around every decision of ``"auto"``: what float32 resolves (1e-2 of the largest) and the threshold."""
    size, threshold = min(rows, columns), max(rows, columns) * torch.finfo(torch.float32).eps
    head, tail = size // 3, size - size // 3
    unresolved, noise = torch.logspace(0, -1, head), torch.rand(tail)
    return {
        **slow_spectra(size),
        **{f"condition 1e{n}": torch.logspace(0, -n, size) for n in (1, 2, 3, 4, 5)},
        "just resolved": torch.cat([torch.ones(1), torch.full((size - 1,), 1.01e-2)]),
        "just unresolved": torch.cat([torch.ones(1), torch.full((size - 1,), 0.99e-2)]),
        "all but one at the threshold": torch.cat([torch.ones(1), torch.full((size - 1,), 1.1 * threshold)]),
        "half at the threshold": torch.cat([torch.ones(head), torch.full((tail,), 1.1 * threshold)]),
        "across the threshold": torch.cat([unresolved, threshold * (0.5 + noise)]),
        "steps of 100": torch.cat([torch.full((n.stop - n.start,), 1e-2**k) for k, n in enumerate(thirds(size))]),
        "collapsed": torch.cat([unresolved, 0.95 * threshold * noise]),
        "collapsed to rounding": torch.cat([unresolved, torch.full((tail,), 1e-7)]),
        "deficient": unresolved,
    }


def thirds(size: int) -> tuple[range, range, range]:
    return range(0, size // 3), range(size // 3, 2 * size // 3), range(2 * size // 3, size)


def errors(matrix: Tensor, **options: str) -> tuple[float, float]:
    """Relative errors of value and gradient, compared with the float64 SVD cut where the contract cuts."""
    expected, wanted = numpy_reference.nuclear_norm(matrix.double().numpy(), eps=torch.finfo(matrix.dtype).eps)
    value, gradient = value_and_gradient(matrix, **options)
    return relative_error(value, expected), relative_error(gradient, wanted)


@pytest.mark.parametrize("size", LARGE, ids=str)
@pytest.mark.parametrize("spectrum", hard_spectra(72, 640))
def test_auto_is_accurate_in_float32(spectrum: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times better than promised, in most cases without a float64 Gram matrix of the whole weight."""
    exact = []
    monkeypatch.setattr(polar, "_polar_gram", lambda m, solve=polar._polar_gram: exact.append(m) or solve(m))
    value, gradient = errors(with_spectrum(hard_spectra(*size)[spectrum], *size).float())
    assert value <= VALUE_ERROR and gradient <= GRADIENT_ERROR / 5
    assert not exact or spectrum in ("across the threshold", "condition 1e4", "condition 1e5", "condition 1e6")


@pytest.mark.parametrize(
    "make",
    [
        lambda m, n: torch.randn(m, n),
        lambda m, n: torch.rand(m, n),  # rounding of sums of one sign does not average out
        lambda m, n: 0.1 + 1e-3 * torch.randn(m, n),
        lambda m, n: 0.1 + 1e-6 * torch.randn(m, n),
        lambda m, n: torch.randn(m, 1).exp() * torch.randn(1, n).mul(2).exp() + 1e-4 * torch.randn(m, n),
        lambda m, n: torch.logspace(0, -6, m)[:, None] * torch.randn(m, n),
        lambda m, n: torch.eye(m, n) + 1e-4 * torch.randn(m, n),
        lambda m, n: torch.ones(m, n),
        lambda m, n: torch.randn(2, n).repeat(m // 2, 1),
    ],
    ids=("Gaussian", "positive", "offset", "large offset", "heavy tails", "graded rows", "identity", "ones", "repeats"),
)
@pytest.mark.parametrize("size", LARGE, ids=str)
def test_auto_is_accurate_on_structured_matrices(size: tuple[int, int], make: Callable[[int, int], Tensor]) -> None:
    value, gradient = errors(make(*size))
    assert value <= VALUE_ERROR and gradient <= GRADIENT_ERROR / 5


@pytest.mark.parametrize("margin", [1e-3, 1e-4, 1e-5])
def test_auto_tells_the_sides_of_the_threshold(margin: float) -> None:
    """A singular value on the wrong side is a gradient error of 1 over the root of the rank."""
    size = (72, 640)
    threshold = max(size) * torch.finfo(torch.float32).eps
    near = threshold * torch.tensor([1 + margin, 1 - margin], dtype=torch.float64)
    for level in (1.0, 2e-2):  # decided from the first Gram matrix of the remainder, or from a later one
        spectrum = torch.cat([torch.ones(20, dtype=torch.float64), torch.full((20,), level, dtype=torch.float64), near])
        # Rounding to float32 moves singular values: the sides are those of the very matrix that goes in.
        value, gradient = errors(with_spectrum(spectrum, *size).float())
        assert value <= VALUE_ERROR and gradient <= GRADIENT_ERROR


def test_singular_values_below_the_threshold_count() -> None:
    size = (200, 5000)  # the sum over 199 directions just below could be 8e-3
    below = 0.9 * max(size) * torch.finfo(torch.float32).eps
    for spectrum in ([1, below], [1] * 20 + [below / 13] * 170):
        value, gradient = errors(with_spectrum(torch.tensor(spectrum), *size).float())
        assert value <= VALUE_ERROR and gradient <= GRADIENT_ERROR


def test_products_may_come_from_any_library(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = with_spectrum(torch.logspace(0, -5, 230), 230, 260).float()
    with_onednn = errors(weight)
    monkeypatch.setattr(polar, "_LINEAR", None)
    assert max(with_onednn) <= GRADIENT_ERROR / 5 and max(errors(weight)) <= GRADIENT_ERROR / 5


@pytest.mark.skipif(polar._LINEAR is None, reason="this torch has no oneDNN")
def test_the_operator_of_onednn_has_the_expected_arguments() -> None:
    arguments = torch.ops.mkldnn._linear_pointwise.default._schema.arguments
    assert [a.name for a in arguments] == ["X", "W", "B", "attr", "scalars", "algorithm"]


def test_products_of_less_than_float32_are_not_taken() -> None:
    weight = with_spectrum(torch.logspace(0, -1, 230), 230, 260).float()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert all(
            torch.equal(a, b)
            for a, b in zip(value_and_gradient(weight), value_and_gradient(weight, method="gram"), strict=True)
        )
    finally:
        torch.set_float32_matmul_precision(before)


def test_polar_batches_what_has_one_shape() -> None:
    weights = [torch.randn(shape) for shape in ((5, 9), (9, 5), (5, 9), (4, 4), (1, 3), (5, 9))]
    leaves = [weight.requires_grad_() for weight in weights]
    value = smoothk.nuclear_norm(leaves, method="polar")
    gradients = torch.autograd.grad(value, leaves)
    alone = [value_and_gradient(weight, method="polar") for weight in weights]
    assert_close_rel(value, sum(v.double() for v, _ in alone), torch.float32)
    for gradient, (_, wanted) in zip(gradients, alone, strict=True):
        assert_close_rel(gradient, wanted, torch.float32)


@pytest.mark.parametrize("method", METHODS)
def test_operator_and_compiled_graph(method: str) -> None:
    weights = [torch.randn(6, 4, 3, 3), torch.randn(8, 5), torch.randn(3, 6, 4, 3).permute(1, 2, 3, 0)]
    assert unavailable_reason("torch") is None  # which defines the operator
    torch.library.opcheck(torch.ops.smoothk_torch.polar_factors, (weights, "spatial", method))

    def penalty(*weights: Tensor) -> Tensor:
        return smoothk.nuclear_norm(weights, unfolding="spatial", method=method)

    leaves = [weight.requires_grad_() for weight in weights]
    compiled = torch.compile(penalty, backend="aot_eager", fullgraph=True)
    values = compiled(*leaves), penalty(*leaves)
    assert torch.equal(*values)
    for pair in zip(*(torch.autograd.grad(value, leaves) for value in values), strict=True):
        assert torch.equal(*pair)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_nan_and_inf_come_through(method: str, bad: float) -> None:
    weight = torch.randn(4, 3)
    weight[1, 2] = bad
    value, gradient = value_and_gradient(weight, method=method)
    assert not value.isfinite() and not gradient.isfinite().any()


@pytest.mark.parametrize("method", METHODS)
def test_layouts(method: str) -> None:
    weight = torch.randn(6, 4, 3, 2, dtype=torch.float64)
    for unfolding in UNFOLDINGS:
        expected = value_and_gradient(weight, unfolding=unfolding, method=method)
        for strided in (
            weight.to(memory_format=torch.channels_last),
            weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
            torch.stack([weight, weight], -1)[..., 0],
        ):
            torch.testing.assert_close(value_and_gradient(strided, unfolding=unfolding, method=method), expected)
    value, gradient = value_and_gradient(torch.randn(4, 1).expand(4, 3), method="svd")  # expanded: rank 1
    assert_close_rel(gradient.norm(), 1.0, torch.float32)


def test_lists_mix_shapes_and_dtypes() -> None:
    weights = [torch.randn(4, 3), torch.randn(2, 3, 3, 2, dtype=torch.float64), torch.randn(5, 4).bfloat16()]
    leaves = [weight.requires_grad_() for weight in weights]
    value = smoothk.nuclear_norm(leaves, unfolding="spatial")
    references = [numpy_reference.nuclear_norm(w.detach().double().numpy(), "spatial") for w in leaves]
    assert value.dtype == torch.float64
    assert relative_error(value.detach(), sum(v for v, _ in references)) < 1e-6
    for gradient, (_, wanted), tolerance in zip(
        torch.autograd.grad(value, leaves), references, (1e-5, 1e-12, 8e-3), strict=True
    ):
        assert relative_error(gradient, wanted) < tolerance
    assert smoothk.nuclear_norm([]) == 0


def test_autocast_changes_nothing() -> None:
    weight = torch.randn(8, 5)
    for method in METHODS:
        outside = value_and_gradient(weight, method=method)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = value_and_gradient(weight, method=method)
        assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_second_derivatives_are_an_error_and_never_zero() -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    value = smoothk.nuclear_norm(weight) + weight.pow(3).sum()
    (gradient,) = torch.autograd.grad(value, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="nuclear_norm"):
        gradient.sum().backward()


def test_weights_are_not_written_and_bits_repeat() -> None:
    weight = torch.randn(40, 90)
    before = weight.clone()
    for method in METHODS:
        first, second = value_and_gradient(weight, method=method), value_and_gradient(weight, method=method)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"weights": [torch.ones(3, 2, dtype=torch.int32)]}, TypeError, r"weights\[0\] must .*torch.int32"),
        ({"weights": [torch.ones(3, 2) * 1j]}, TypeError, r"weights\[0\] must .*complex64"),
        ({"weights": None}, TypeError, "weights must .*got NoneType"),
        ({"unfolding": "row"}, ValueError, "unfolding must be one of 'channel', 'spatial', got 'row'"),
        ({"method": "qr"}, ValueError, "method must be one of 'auto', 'svd', 'gram', 'polar', got 'qr'"),
        ({"backend": "metal"}, ValueError, "backend must be None or one of"),
        ({"backend": "cpp"}, smoothk.BackendUnavailable, "backend 'cpp' cannot run nuclear_norm"),
    ],
)
def test_bad_arguments(kwargs: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        smoothk.nuclear_norm(**{"weights": [torch.ones(3, 2)], **kwargs})


@pytest.mark.parametrize("size", [(6, 9), (72, 640)], ids=str)
@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("method", METHODS)
def test_extreme_scales(method: str, scale: float, size: tuple[int, int]) -> None:
    weight = torch.randn(size)
    value = smoothk.nuclear_norm(weight * scale, method=method).double()
    torch.testing.assert_close(value / scale, smoothk.nuclear_norm(weight.double(), method="svd"), rtol=1e-3, atol=0)
