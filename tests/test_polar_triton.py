"""`kernels/polar.py` in Triton's interpreter and in the machine code for GPUs that are not here."""

from __future__ import annotations

from collections import Counter

import numpy_reference
import pytest
import torch
from sass import Binary, Kernel, compile_kernels
from test_nuclear import relative_error, with_spectrum
from torch import Tensor

import smoothk
from smoothk import reference
from smoothk.functional import polar_factors
from smoothk.unfolding import UNFOLDINGS

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret and not torch.cuda.is_available():
    pytest.skip("no GPU and no interpreter", allow_module_level=True)

from smoothk.kernels import polar as kernels  # noqa: E402

DEVICE = smoothk.backend.triton_device()
# Sides below, at and above a tile, wide and tall, every number of axes, one row, one column, nothing.
SHAPES = ((70, 27), (64, 64), (8, 5, 3, 3), (3, 40, 3, 3), (1, 7), (130, 2), (9, 2, 3), (2, 3, 2, 2, 2), (0, 3), (4, 0))


def weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


def strided(weight: Tensor) -> list[Tensor]:
    """The same values in other layouts; the last one is not even aligned."""
    return [
        weight.to(memory_format=torch.channels_last),
        weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        torch.stack([weight, weight], -1)[..., 0],
        torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view_as(weight),
    ]


@pytest.mark.parametrize("unfolding", UNFOLDINGS)
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
def test_all_weights_at_once_are_those_of_the_definition(dtype: torch.dtype, unfolding: str) -> None:
    ws = weights(*SHAPES, dtype=dtype) + [torch.zeros(3, 4, dtype=dtype, device=DEVICE)]
    values, factors = kernels.polar_factors(ws, unfolding, "polar")
    expected, wanted = reference.polar_factors([w.double() for w in ws], unfolding, "polar")
    assert values.dtype == torch.float32 and all(factor.dtype == torch.float32 for factor in factors)
    torch.testing.assert_close(values.double(), expected, rtol=2e-6, atol=0)
    for factor, truth in zip(factors, wanted, strict=True):
        assert factor.shape == truth.shape and factor.is_contiguous()
        assert (factor - truth).norm() <= 1e-5 * truth.norm()


def test_both_sides_longer_than_a_tile() -> None:
    """The tiles above the diagonal of the symmetric products are those below it, mirrored."""
    ws = weights((66, 70), (131, 67))
    values, factors = kernels.polar_factors(ws, "channel", "polar")
    expected, wanted = reference.polar_factors([w.double() for w in ws], "channel", "polar")
    torch.testing.assert_close(values.double(), expected, rtol=2e-6, atol=0)
    for factor, truth in zip(factors, wanted, strict=True):
        assert (factor - truth).norm() <= 1e-5 * truth.norm()


def test_nothing_but_empty_weights() -> None:
    values, factors = kernels.polar_factors(weights((0, 3), (4, 0, 3, 3)), "spatial", "polar")
    assert torch.equal(values, torch.zeros(2, device=DEVICE)) and [f.shape for f in factors] == [(0, 3), (4, 0, 3, 3)]


@pytest.mark.parametrize("unfolding", UNFOLDINGS)
def test_layouts(unfolding: str) -> None:
    (weight,) = weights((6, 4, 3, 2))
    value, (factor,) = kernels.polar_factors([weight], unfolding, "polar")
    for other in strided(weight):
        assert torch.equal(other, weight)
        same_value, (same_factor,) = kernels.polar_factors([other], unfolding, "polar")
        assert torch.equal(same_value, value) and torch.equal(same_factor, factor)


# Error of value and gradient. The interpreter does not round float32 operands to TF32.
PROMISED = {"tf32x3": (2e-6, 1e-5), "fp16": (1e-3, 5e-3)}
SPECTRA = {
    "Gaussian": None,
    "1/i": 1 / torch.arange(1.0, 41),
    "condition 100": torch.logspace(0, -2, 40),
    "repeated": torch.cat([torch.ones(20), torch.full((20,), 0.1)]),
}


@pytest.mark.parametrize("precision", PROMISED)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_error_to_the_singular_value_decomposition(spectrum: str, precision: str) -> None:
    s = SPECTRA[spectrum]
    weight = torch.randn(40, 90) if s is None else with_spectrum(s, 40, 90).float()
    expected, wanted = numpy_reference.nuclear_norm(weight.double().numpy())
    value, (factor,) = kernels.polar_factors([weight.to(DEVICE)], "channel", "polar", precision)
    errors = relative_error(value[0].cpu(), expected), relative_error(factor.cpu(), wanted)
    assert errors[0] <= PROMISED[precision][0] and errors[1] <= PROMISED[precision][1]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales(scale: float) -> None:
    (weight,) = weights((6, 9))
    for precision in PROMISED:
        value, (factor,) = kernels.polar_factors([weight], "channel", "polar", precision)
        scaled, (same,) = kernels.polar_factors([weight * scale], "channel", "polar", precision)
        torch.testing.assert_close(scaled / scale, value, rtol=1e-3, atol=0)
        torch.testing.assert_close(same, factor, rtol=0, atol=2e-3)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_fill_their_own_weight(bad: float) -> None:
    ws = weights((4, 3), (5, 6))
    ws[0][1, 2] = bad
    values, factors = kernels.polar_factors(ws, "channel", "polar")
    assert not values[0].isfinite() and not factors[0].isfinite().any()
    assert values[1].isfinite() and factors[1].isfinite().all()


def test_reruns_repeat_the_bits_and_weights_are_not_written() -> None:
    ws = weights((70, 30), (8, 5, 3, 3))
    before = [w.clone() for w in ws]
    first, second = (kernels.polar_factors(ws, "spatial", "polar") for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ws, before, strict=True))


def test_three_launches_an_iteration_for_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    def count(kernel: object, programs: int, launch=kernels.launch, **arguments: object) -> None:
        launched.append(kernel.__name__)
        launch(kernel, programs, **arguments)

    monkeypatch.setattr(kernels, "launch", count)
    kernels.polar_factors(weights(*SHAPES), "channel", "polar")
    iterations = len(smoothk.polar.QUINTICS)
    assert Counter(launched) == {
        "norm_kernel": 1,
        "load_kernel": 1,
        "symmetric_kernel": 2 * iterations,
        "update_kernel": iterations,
    }


def test_tables_serve_as_long_as_the_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[object] = []
    monkeypatch.setattr(kernels, "_Plan", lambda *args, make=kernels._Plan: built.append(1) or make(*args))
    ws = weights((5, 4), (6, 3, 3, 3))
    for _ in range(3):
        kernels.polar_factors(ws, "channel", "polar")
        ws[0].mul_(2)
    assert len(built) == 1
    kernels.polar_factors(ws, "spatial", "polar")
    kernels.polar_factors([w.clone() for w in ws], "channel", "polar")
    assert len(built) == 3


@pytest.mark.parametrize("unfolding", UNFOLDINGS)
def test_by_name_through_the_public_functions(unfolding: str) -> None:
    options = {"unfolding": unfolding, "method": "polar"}
    leaves = [w.requires_grad_() for w in (*weights((6, 4, 3, 3), (5,)), *weights((7, 3), dtype=torch.bfloat16))]
    results = []
    for backend in ("triton", "torch"):
        value = smoothk.nuclear_norm(leaves, backend=backend, **options)
        results.append((value, *torch.autograd.grad(value, leaves, create_graph=True)))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= (1e-2 if ours.dtype == torch.bfloat16 else 1e-5) * theirs.norm()
    with pytest.raises(RuntimeError, match="no second derivative"):
        results[0][1].sum().backward()
    pairs = polar_factors([w.detach() for w in leaves], backend="triton", **options)
    for (_, factor), gradient in zip(pairs, results[0][1:], strict=True):
        assert torch.equal(factor.to(gradient.dtype), gradient)


def test_penalty_of_a_model() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(5, 2)).to(DEVICE)
    results = []
    for backend in ("triton", "torch"):
        model.zero_grad()
        penalty = smoothk.SmoothnessPenalty(model, nuclear=0.5, method="polar", backend=backend)
        results.append((penalty.accumulate_grad(), model[0].weight.grad, model[2].weight.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_operator_and_compiled_graph() -> None:
    ws = weights((6, 4, 3, 3), (5, 8))
    smoothk.backend.choose("polar_factors", "triton", ws)  # registers it
    torch.library.opcheck(torch.ops.smoothk_triton.polar_factors, (ws, "spatial", "polar"))

    def penalty(*ws: Tensor) -> Tensor:
        return smoothk.nuclear_norm(ws, method="polar", backend="triton")

    assert torch.equal(torch.compile(penalty, backend="aot_eager", fullgraph=True)(*ws), penalty(*ws))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"method": "auto"}, "backend 'triton' cannot run nuclear_norm: it has no nuclear_norm kernel"),
        ({"method": "svd"}, "backend 'triton' cannot run nuclear_norm"),
        ({"method": "polar", "weights": [torch.ones(3, 2).double()]}, "takes .*float32.* got torch.float64"),
        ({"method": "polar", "weights": [torch.ones(3, 2, device="meta")]}, "takes dense tensors on"),
    ],
)
def test_what_it_cannot_run(kwargs: dict, message: str) -> None:
    with pytest.raises(smoothk.BackendUnavailable, match=message):
        smoothk.nuclear_norm(**{"weights": weights((3, 2)), "backend": "triton", **kwargs})
    assert smoothk.backend.choose("polar_factors", None, weights((3, 2))) == "torch"  # never by itself


# Machine code


def kernel(arch: int, precision: str, role: str) -> Kernel:
    dtype, input_precision, terms = kernels.PRECISIONS[precision]
    iterate = "*fp16" if dtype == torch.float16 else "*fp32"
    last = role == "last update"
    constants = {
        "PRECISION": input_precision,
        "FIELDS": kernels.FIELDS,
        "TILE": kernels.TILE,
        "STEP": terms,
    }
    if role in ("gram", "polynomial"):
        arguments = {"factor": iterate, "out": iterate, "beta": "fp32", "alpha": "fp32"}
        constants["GRAM"] = role == "gram"
    else:
        arguments = {"x": iterate, "b": iterate, "out": "*fp32" if last else iterate, "partials": "*fp64"}
        arguments |= {"alpha": "fp32", "slots": "i32"}
        constants |= {"LAST": last, "DTYPE": kernels.DTYPES[torch.float32]}
    name = "symmetric_kernel" if "GRAM" in constants else "update_kernel"
    tables = {"tiles": "*i64", "records": "*i64"}
    return Kernel("smoothk.kernels.polar", name, tables | arguments, constants, arch)


ROLES = ("gram", "polynomial", "update", "last update")
CASES = [(90, precision, role) for precision in kernels.PRECISIONS for role in ROLES]
CASES += [(arch, precision, role) for arch in (80, 100) for precision in ("tf32x3", "fp16") for role in ROLES]
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


@pytest.fixture(scope="module")
def binaries() -> dict[tuple[int, str, str], Binary]:
    return dict(zip(CASES, compile_kernels([kernel(*case) for case in CASES]), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_machine_code(case: tuple[int, str, str], binaries: dict[tuple[int, str, str], Binary]) -> None:
    binary = binaries[case]
    opcodes = [instruction.opcode for instruction in binary.instructions]
    products = [opcode for opcode in opcodes if opcode.startswith(TENSOR_CORE[case[0]])]
    assert products and binary.spills == binary.local_bytes == 0
    copies = [instruction.bits for instruction in binary.instructions if instruction.opcode.startswith("LDGSTS")]
    assert copies
    if case[1] != "tf32":  # whose right operand the tensor cores of sm_90 want transposed, entry by entry
        assert set(copies) == {128}
