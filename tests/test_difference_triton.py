"""The Triton operators of the difference penalty called directly; the case table is in test_difference.py.

Without a GPU they run in Triton's interpreter, one tile after the other: values, masks, offsets and tables are tested
here, races are not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_close_rel
from test_ops import COEFFICIENTS, EPS, LAYOUTS, OPTIONS, expected
from test_tensor_table import Streams
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import smoothk
from smoothk.backend import KERNEL_DTYPES, triton_device, unavailable_reason
from smoothk.functional import NORMS
from smoothk.recipes.models import build

if unavailable_reason("triton") is not None:
    pytest.skip(str(unavailable_reason("triton")), allow_module_level=True)

import triton
import triton.language as tl
from smoothk.kernels import difference, difference_ops, tensor_table

DEVICE = triton_device()
DTYPES = KERNEL_DTYPES["difference_penalty"]


def coefficients(orders: list[int]) -> Tensor:
    return COEFFICIENTS[: len(orders)].to(DEVICE)


def penalty(weights: list[Tensor], orders: list[int], *options: Any) -> Tensor:
    return torch.ops.smoothk_triton.difference_penalty(weights, orders, *options, EPS)


def backward(weights: list[Tensor], orders: list[int], *options: Any) -> list[Tensor]:
    return torch.ops.smoothk_triton.difference_penalty_backward(coefficients(orders), weights, orders, *options, EPS)


def accumulate(grads: list[Tensor], weights: list[Tensor], orders: list[int], *options: Any) -> Tensor:
    factors = coefficients(orders)
    return torch.ops.smoothk_triton.difference_penalty_accumulate_(grads, weights, factors, orders, *options, EPS)


def check(weights: list[Tensor], grads: list[Tensor], orders: list[int], *options: Any) -> None:
    """One `accumulate` against NumPy."""
    dtype = weights[0].dtype
    terms, gradients = expected(weights, orders, *options)
    before = [grad.clone() for grad in grads]
    result = accumulate(grads, weights, orders, *options)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and not result.requires_grad
    wanted = COEFFICIENTS[: len(orders)] * torch.as_tensor(terms)
    assert_close_rel(result, wanted, torch.float64 if dtype == torch.float64 else torch.float32)
    for grad, start, gradient in zip(grads, before, gradients, strict=True):
        assert_close_rel(grad, start.double().cpu() + torch.as_tensor(gradient), grad.dtype)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def newest_plan() -> difference_ops._Plan:
    return next(reversed(difference_ops._plans._tables.values()))[1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulate_adds_the_scaled_gradient(layout: str, dtype: torch.dtype) -> None:
    place_weight, place_grad = LAYOUTS[layout]
    shapes = ((7, 5, 3, 3), (1, 4, 2, 2), (9, 2, 1, 17))
    turn = len(LAYOUTS) * DTYPES.index(dtype) + list(LAYOUTS).index(layout)
    for orders, norm, normalized in OPTIONS[turn % 12 :: 12]:
        for dim in ([0], [-1, 1]) if norm != "l21" else ([2, 9, 1],):
            weights = [place_weight(randn(*shape, dtype=dtype)) for shape in shapes]
            grads = [place_grad(randn(*shape, dtype=dtype)) for shape in shapes]
            check(weights, grads, orders, dim, norm, normalized)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_tiles(dtype: torch.dtype, norm: str) -> None:
    # Full and partial tiles, ends inside and between them, an axis in the middle, and too few rows for the order.
    columns, turn = 2048 // dtype.itemsize, DTYPES.index(dtype) + NORMS.index(norm)
    weights = [
        randn(9, columns + 16, dtype=dtype),
        randn(6, 2, columns // 4, dtype=dtype).movedim(1, 0),
        randn(2, columns // 2, dtype=dtype),
        randn(1, columns, dtype=dtype),
    ]
    grads = [torch.randn_like(weight) for weight in weights]
    check(weights, grads, ([1], [2], [1, 2])[turn % 3], [0], norm, turn % 2 == 1)
    layout = newest_plan().layout
    assert 0 < layout.row_tiles == layout.tiles.programs


def test_row_and_flat_tiles_in_one_launch(launches: list[dict[str, Any]]) -> None:
    weights = [randn(64, 27), randn(10, 512), randn(5), randn(12, 130), randn(3, 3, 3, 3)]
    for orders in ([1], [1, 2]):
        check(weights, [torch.randn_like(weight) for weight in weights], orders, [0], "huber", False)
    assert [(each["ROW_TILES"], each["FLAT_TILES"]) for each in launches] == [(True, True)] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_take_float32_gradients(dtype: torch.dtype) -> None:
    weights = [randn(7, 1024, dtype=dtype), randn(5, 3, dtype=dtype)]
    for orders, norm in (([1], "l1"), ([1, 2], "l2")):
        check(weights, [torch.randn(w.shape, device=DEVICE) for w in weights], orders, [0], norm, False)


@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter cuts bfloat16 off")
def test_bfloat16_gradients_are_rounded_to_nearest_even() -> None:
    # Integers make the gradient exact, so that only the last rounding is left.
    weight = torch.randint(-8, 9, (9, 256)).to(DEVICE).bfloat16()
    grad = randn(9, 256).mul(64).bfloat16()
    exact = torch.from_numpy(expected([weight], [1], [0], "l2", False)[1][0]).float().to(DEVICE)
    wanted = (grad.float() + exact).bfloat16()
    accumulate([grad], [weight], [1], [0], "l2", False)
    assert torch.equal(grad, wanted)


def test_sums_of_many_tiles() -> None:
    weights = [randn(20, 700), randn(300, 3), randn(2, 1100)]  # in all, several of every kind
    for orders, norm, normalized in (([1, 2], "l2", False), ([2], "l21", True)):
        check(weights, [torch.randn_like(weight) for weight in weights], orders, [0], norm, normalized)


@triton.jit
def sum_kernel(x, count, result):
    tl.store(result, difference._sum(x, count))


@pytest.mark.parametrize("count", [0, 1, 2048, 4999])
def test_sums_of_more_partials_than_one_load_takes(count: int) -> None:
    x, result = torch.rand(5000, device=DEVICE), torch.full((1,), torch.nan, dtype=torch.float64, device=DEVICE)
    sum_kernel[(1,)](x, count, result)
    assert_close_rel(result, x[:count].double().sum().view(1), torch.float64)


def test_backward_is_the_gradient_in_the_strides_of_the_weight() -> None:
    base = randn(6, 4, 3, 3, dtype=torch.float64)
    weights = [LAYOUTS[name][0](base) for name in ("contiguous", "channels_last", "transposed", "misaligned")]
    weights.append(randn(1, 4, 1, 3, dtype=torch.float64))  # no difference along dim: a gradient of zeros
    for orders, norm, normalized in OPTIONS[::5]:
        grads = backward(weights, orders, [0, 2], norm, normalized)
        gradients = expected(weights, orders, [0, 2], norm, normalized)[1]
        for grad, weight, gradient in zip(grads, weights, gradients, strict=True):
            assert grad.stride() == weight.stride()
            assert_close_rel(grad, gradient, torch.float64)


def test_empty_weights_take_nothing_from_the_others() -> None:
    full = randn(8, 5)
    empty = [randn(0, 6), randn(9, 4)[::2, :0], full[:1].expand(4, 5)[:, :0]]
    for orders, norm, normalized in OPTIONS[::5]:
        for weights in ([*empty, full], [full, *empty]):
            check(weights, [torch.zeros_like(w) if w is full else w for w in weights], orders, [0, 1], norm, normalized)
            gradients = expected(weights, orders, [0, 1], norm, normalized)[1]
            for grad, gradient in zip(backward(weights, orders, [0, 1], norm, normalized), gradients, strict=True):
                assert_close_rel(grad, gradient, torch.float32)


def test_a_dim_that_is_missing_or_short_leaves_the_gradient_alone() -> None:
    for orders, norm, normalized in OPTIONS[::5]:
        weights = [randn(min(orders), 3), randn(min(orders), 0)]
        grads = [torch.full_like(weight, -0.0) for weight in weights]
        assert not accumulate(grads, weights, orders, [0, 5], norm, normalized).any()
        assert grads[0].signbit().all()  # adding 0 would have cleared it


@pytest.mark.parametrize("norm", NORMS)
def test_a_nan_reaches_every_gradient_entry_it_touches(norm: str) -> None:
    for order, columns in ((1, 128), (2, 128), (1, 4), (2, 4)):
        weight = randn(17, columns)
        weight[8, 1] = float("nan")
        (grad,) = backward([weight], [order], [0], norm, False)
        touched = torch.zeros(17, columns, dtype=torch.bool)
        touched[8 - order : 9 + order, slice(None) if norm == "l21" else 1] = True  # a group's length has all columns
        assert torch.equal(grad.isnan().cpu(), touched)


@pytest.mark.parametrize("norm", ["l2", "l21"])
def test_reruns_have_the_same_bits(norm: str) -> None:
    weights = [randn(9, 520), randn(9, 3, 3, 3), randn(33)]

    def bits() -> tuple[bytes, ...]:
        grads = [torch.ones_like(weight) for weight in weights]
        terms = accumulate(grads, weights, [1, 2], [0], norm, norm == "l2")
        return tuple(tensor.cpu().numpy().tobytes() for tensor in (terms, *grads))

    assert len({bits() for _ in range(3)}) == 1


@pytest.mark.parametrize(("norm", "normalized"), [("l2", False), ("l2", True), ("l21", False)])
def test_a_launch_leaves_its_tables_as_they_were(norm: str, normalized: bool, launches: list[dict[str, Any]]) -> None:
    weights = [randn(9, 520), randn(40, 700), randn(5)]
    terms = [torch.ops.smoothk_triton.difference_penalty(weights, [1, 2], [0], norm, normalized, EPS) for _ in range(3)]
    assert len({launch["tickets"].data_ptr() for launch in launches}) == 1
    assert not launches[0]["tickets"].any()
    assert all(torch.equal(term, terms[0]) for term in terms)


@pytest.mark.skipif(DEVICE != "cpu", reason="files are on the CPU")
@pytest.mark.parametrize(
    ("shape", "rows", "dim"), [((24, 2**27 - 1024), 3, 0), ((3, 2**30), 1, 1)], ids=["row tiles", "flat tiles"]
)
def test_offsets_beyond_two_to_the_31(
    shape: tuple[int, int], rows: int, dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Sparse files of zeros, but for a corner. Only the last tile runs: the others have no share in anything.
    weight, grad = (
        torch.from_file(str(tmp_path / name), shared=True, size=shape[0] * shape[1], dtype=torch.bfloat16).view(shape)
        for name in ("weight", "grad")
    )
    weight[-rows:, -3:] = torch.randn(rows, 3)
    for builder in (tensor_table.row_tiles, tensor_table.flat_tiles):
        monkeypatch.setattr(difference_ops, builder.__name__, lambda *args, builder=builder: builder(*args)[-1:])
    near = weight[:, -8:].clone()
    terms, (gradient,) = expected([near], [1, 2], [dim], "l2", False)
    value = accumulate([grad], [weight], [1, 2], [dim], "l2", False)
    assert_close_rel(value, COEFFICIENTS * torch.as_tensor(terms), torch.float32)
    assert_close_rel(grad[:, -8:], gradient, torch.bfloat16)
    assert newest_plan().layout.row_tiles == (dim == 0)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every launch from here on."""
    found: list[dict[str, Any]] = []
    launch = difference_ops.launch

    def record(kernel: Any, programs: int, **arguments: Any) -> None:
        found.append({"kernel": kernel, "programs": programs, **arguments})
        launch(kernel, programs, **arguments)

    monkeypatch.setattr(difference_ops, "launch", record)
    return found


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched from here on; none runs."""
    names: list[str] = []
    monkeypatch.setattr(difference_ops, "launch", lambda kernel, programs, **_: names.append(kernel.__name__))
    return names


@pytest.mark.parametrize(
    ("norm", "normalized", "kernels"),
    [
        ("l2", False, ["difference_kernel"]),
        ("huber", False, ["difference_kernel"]),
        ("l1", True, ["difference_kernel"] * 2),
        ("l21", False, ["group_kernel", "difference_kernel"]),
        ("l21", True, ["group_kernel", "difference_kernel"]),
    ],
)
def test_launches_and_memory_for_a_resnet18(
    norm: str, normalized: bool, kernels: list[str], counted: list[str]
) -> None:
    model = build("resnet18", 10).to(DEVICE)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    smooth = smoothk.SmoothnessPenalty(model, 1e-3, 1e-3, norm=norm, normalized=normalized, backend="triton")
    smooth.accumulate_grad()
    assert counted == kernels  # 21 weights, both orders
    plan = newest_plan()
    tables = [plan.layout.tiles, *([plan.layout.group_tiles] if norm == "l21" else [])]
    memory = [*plan.shared.values(), *plan.main.values(), *(t for table in tables for t in vars(table).values())]
    assert sum(t.nbytes for t in memory if isinstance(t, Tensor)) < 2**20
    counted.clear()
    smooth().backward()
    assert counted == kernels[:1] + kernels  # the value, and the gradient with all it needs


def test_nothing_waits_for_the_device(counted: list[str]) -> None:
    class NoSync(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
            return func(*args, **(kwargs or {}))

    weights = [randn(9, 512), randn(4, 3, 3, 3).to(memory_format=torch.channels_last)]
    with NoSync():
        for norm, normalized in (("l2", False), ("l1", True), ("l21", False)):
            accumulate([torch.zeros_like(w) for w in weights], weights, [1, 2], [0], norm, normalized)
    assert len(counted) == 5


@pytest.fixture
def empty_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difference_ops, "_plans", tensor_table.TableCache(2))
    monkeypatch.setattr(difference_ops, "_layouts", tensor_table.TableCache(2))


@pytest.mark.usefixtures("empty_caches")
def test_tables_are_built_once_and_again_when_a_tensor_moves(launches: list[dict[str, Any]]) -> None:
    weights, grads = [randn(9, 3), randn(5)], [torch.zeros(9, 3, device=DEVICE), torch.zeros(5, device=DEVICE)]
    scale = torch.ones(1, dtype=torch.float64, device=DEVICE)

    def step() -> dict[str, Any]:
        options = ([1], [0], "l2", False, EPS)
        torch.ops.smoothk_triton.difference_penalty_accumulate_(grads, weights, scale, *options)
        return launches[-1]

    first = step()
    once = grads[0].clone()
    scale.mul_(2)
    assert step()["addresses"] is first["addresses"]  # a new coefficient: not even a copy
    assert_close_rel(grads[0], 3 * once.double(), torch.float32)
    grads[0] = torch.zeros(9, 3, device=DEVICE)
    moved = step()
    assert moved["addresses"] is not first["addresses"] and moved["tiles"] is first["tiles"]
    assert_close_rel(grads[0], 2 * once.double(), torch.float32)
    weights[0] = weights[0].clone()
    step()
    weights[0] = torch.cat([weights[0].flatten(), weights[0].new_zeros(1)])[1:].view(9, 3)  # and is misaligned
    step()
    assert len({id(launch["addresses"]) for launch in launches}) == 4
    assert len(difference_ops._plans._tables) == 2
    step_of_old = accumulate([once], [randn(9, 3)], [1], [0], "l2", False)
    assert step_of_old.isfinite().all()


@pytest.mark.usefixtures("empty_caches")
def test_a_capture_without_a_warm_up_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch)
    weight, grad = randn(9, 3), torch.zeros(9, 3, device=DEVICE)
    streams.current = (7, True)
    with pytest.raises(RuntimeError, match=r"warm-up call .*zero_grad\(set_to_none=False\)"):
        accumulate([grad], [weight], [1], [0], "l2", False)
    assert not grad.any()
    streams.current = (1, False)
    accumulate([grad], [weight], [1], [0], "l2", False)
    streams.current = (7, True)
    accumulate([grad], [weight], [1], [0], "l2", False)
    assert_close_rel(grad, 2 * torch.from_numpy(expected([weight], [1], [0], "l2", False)[1][0]), torch.float32)


def test_only_l21_needs_memory_for_every_difference() -> None:
    for norm, entries in (("l2", 0), ("l21", 2 * 5000)):
        weight = randn(5000)
        accumulate([torch.zeros_like(weight)], [weight], [1, 2], [0], norm, False)
        assert newest_plan().shared["factors"].numel() == entries


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_graph_follows_its_coefficients_and_has_the_bits_of_a_call() -> None:
    weights = [randn(64, 576), randn(64, 27)]
    grads = [torch.zeros_like(weight) for weight in weights]
    factors = torch.ones(2, dtype=torch.float64, device=DEVICE)

    def step() -> Tensor:
        for grad in grads:
            grad.zero_()
        options = ([1, 2], [0], "l2", False, EPS)
        return torch.ops.smoothk_triton.difference_penalty_accumulate_(grads, weights, factors, *options)

    step()  # the warm-up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        terms = step()
    for value in (1.0, 3.0):
        factors.fill_(value)
        replays = []
        for _ in range(100):
            graph.replay()
            replays.append([terms.clone(), *(grad.clone() for grad in grads)])
        called = [step(), *grads]
        assert all(torch.equal(a, b) for replay in replays for a, b in zip(replay, called, strict=True))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"orders must be \[1\], \[2\] or \[1, 2\], got \[1, 3\]", {"orders": [1, 3]}),
        ("norm must be one of l2, l1, l21, huber, got l3", {"norm": "l3"}),
        ("weights must be of torch.float32, .*, got torch.float8_e4m3fn", {"dtype": torch.float8_e4m3fn}),
        (r"weights must have one dtype .* got .*float32 .* and .*float64", {"weights": [(4, 3), (2, 5, "double")]}),
        ("grads must have one tensor per weight, got 1 for 2", {"grads": [(4, 3)]}),
        (r"grads\[1\] must have the shape of weights\[1\], got \[5, 2\] for", {"grads": [(4, 3), (5, 2)]}),
        ("grads must all be of torch.float32 .* got torch.float64", {"grads": [(4, 3, "double"), (2, 5, "double")]}),
        (r"coefficients must be \[1\] on .*, got \[2\] on", {"coefficients": 2}),
        (r"grads must not share memory, got grads\[0\] again as grads\[1\]", {"share": True}),
        (r"grads\[1\] must not be an expanded tensor", {"expand": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_change_nothing(message: str, change: dict[str, Any]) -> None:
    def make(shapes: Any) -> list[Tensor]:
        return [torch.ones(s[:2], device=DEVICE, dtype=torch.float64 if len(s) > 2 else torch.float32) for s in shapes]

    weights, grads = (make(change.get(name, [(4, 3), (2, 5)])) for name in ("weights", "grads"))
    if "dtype" in change:
        weights = [weight.to(change["dtype"]) for weight in weights]
    if "share" in change:
        weights, grads = weights[:1] * 2, grads[:1] * 2
    if "expand" in change:
        grads[1] = grads[1][:1].expand(2, 5)
    factors = torch.ones(change.get("coefficients", 1), dtype=torch.float64, device=DEVICE)
    options = (change.get("orders", [1]), [0], change.get("norm", "l2"), False, EPS)
    if "orders" in change:
        factors = factors.repeat(2)
    with pytest.raises(ValueError, match=message):
        torch.ops.smoothk_triton.difference_penalty_accumulate_(grads, weights, factors, *options)
    assert all(torch.equal(grad, torch.ones_like(grad)) for grad in grads)


@pytest.mark.parametrize("name", [f"difference_penalty{part}" for part in ("", "_backward", "_accumulate_")])
def test_opcheck(name: str) -> None:
    free = name != "difference_penalty_accumulate_"  # which has no derivative
    weights = [randn(4, 3, 2).requires_grad_(free), randn(3, 5).t().requires_grad_(free)]
    first = {
        "difference_penalty": (),
        "difference_penalty_backward": (torch.tensor([2.0, 3.0], device=DEVICE, requires_grad=True),),
        "difference_penalty_accumulate_": ([torch.ones_like(weight) for weight in weights],),
    }[name]
    last = () if free else (coefficients([1, 2]),)
    arguments = (*first, weights, *last, [1, 2], [0], "l21", True, EPS)
    torch.library.opcheck(getattr(torch.ops.smoothk_triton, name).default, arguments)


def test_derivatives() -> None:
    weights = [randn(4, 3, dtype=torch.float64).requires_grad_(), randn(5, dtype=torch.float64).requires_grad_()]

    def terms(*tensors: Tensor) -> Tensor:
        return torch.ops.smoothk_triton.difference_penalty(list(tensors), [1, 2], [0], "huber", True, EPS)

    assert torch.autograd.gradcheck(terms, weights, fast_mode=True)
    assert torch.autograd.gradgradcheck(terms, weights, fast_mode=True)


def test_smoothness_penalty_of_a_model() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 9, 1), nn.Linear(140, 9)).to(DEVICE) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    values = []
    for model, backend in zip(models, ("triton", "torch"), strict=True):
        smooth = smoothk.SmoothnessPenalty(model, 0.1, 0.2, dim=(0, 1), backend=backend)
        smooth().backward()
        values += [smooth().detach(), smooth.accumulate_grad()]
    for value in values:
        assert_close_rel(value, values[2].double(), torch.float32)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        if other.grad is not None:
            assert_close_rel(one.grad, other.grad.double(), torch.float32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of its own functions
def test_compiles_into_one_graph() -> None:
    weights = [randn(6, 4).requires_grad_(), randn(5).requires_grad_()]

    def value(*tensors: Tensor) -> Tensor:
        return smoothk.difference_penalty(tensors, 2, norm="huber", backend="triton")

    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    for one, other in zip(*(torch.autograd.grad(f(*weights), weights) for f in (compiled, value)), strict=True):
        torch.testing.assert_close(one, other)
