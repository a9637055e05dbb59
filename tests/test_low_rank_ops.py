"""The low-rank convolution in PyTorch: methods, operators, autocast, threads."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close_rel
from small_layers import expected, layers, with_method
from torch import Tensor

import smoothk
from smoothk import factor_cache
from smoothk.backend import BackendUnavailable, unavailable_reason
from smoothk.layers import _LowRank

torch_deprecations = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of its own functions
cpp_missing = unavailable_reason("cpp")
pytestmark = [
    pytest.mark.skipif(cpp_missing is not None, reason=str(cpp_missing)),
    # torch says so of its own layers, too.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),
]


@pytest.mark.parametrize("method", ["auto", "fused", "pair", "merged"])
def test_layers_have_one_result_by_every_method(method: str) -> None:
    for layer, x in layers():
        layer.method = method
        wanted = expected(layer, x)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert_close_rel(layer(x), wanted, torch.float32)
        with torch.inference_mode():
            assert_close_rel(layer(x), wanted, torch.float32)


def test_a_method_is_checked() -> None:
    layer = smoothk.LowRankLinear(4, 4, 2)
    with pytest.raises(ValueError, match="method must be one of 'auto', 'fused', 'pair', 'merged', got 'best'"):
        layer.method = "best"
    assert layer.method == "auto"


@pytest.mark.parametrize("method", ["pair", "merged"])
def test_a_backend_with_a_kernel_has_one_method(method: str) -> None:
    x, v, u = torch.randn(1, 3, 5, 5), torch.randn(2, 3, 3, 3), torch.randn(4, 2, 1, 1)
    with pytest.raises(ValueError, match=f"method must be 'auto' or 'fused' with backend 'cpp', got '{method}'"):
        smoothk.low_rank_conv2d(x, v, u, method=method, backend="cpp")


def test_what_the_kernel_does_not_take() -> None:
    x, v, u = torch.randn(1, 3, 5, 5), torch.randn(2, 3, 3, 3), torch.randn(4, 2, 1, 1)
    with pytest.raises(BackendUnavailable, match="cpp.*float64"):
        smoothk.low_rank_conv2d(x.double(), v.double(), u.double(), backend="cpp")
    wide = x.double(), v.double(), u.double()
    volume = torch.randn(1, 3, 4, 4, 4), torch.randn(2, 3, 3, 3, 3), torch.randn(4, 2, 1, 1, 1)
    with pytest.raises(BackendUnavailable, match="backend 'cpp' cannot run low_rank_conv: it has no 3-d kernel"):
        smoothk.low_rank_conv3d(*volume, backend="cpp")
    for tensors, op in ((wide, smoothk.low_rank_conv2d), (volume, smoothk.low_rank_conv3d)):
        torch.testing.assert_close(op(*tensors, method="fused"), op(*tensors, method="pair"))  # quietly the pair


def test_residual_and_relu_in_one_call() -> None:
    for layer, x in layers():
        plain = expected(layer, x)
        residual = torch.randn(plain.shape)
        added = plain + residual.double()
        for method in ("fused", "pair", "merged"):
            layer.method = method
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    assert_close_rel(layer(x, residual, True), added.relu(), torch.float32)
                    assert_close_rel(layer(x, None, True), plain.relu(), torch.float32)
                    assert_close_rel(layer(x, residual), added, torch.float32)


def test_a_residual_that_is_broadcast() -> None:
    layer, x = with_method(smoothk.LowRankConv2d(4, 6, 3, 2, padding=1), "fused"), torch.randn(2, 4, 5, 5)
    residual = torch.randn(6, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, residual), layer(x) + residual)


@pytest.mark.parametrize("method", ["fused", "pair", "merged"])
def test_a_residual_of_another_kind(method: str) -> None:
    """Torch's rules of broadcasting and promotion hold by every method, in a layer's first call and in later ones."""
    layer, x = with_method(smoothk.LowRankConv2d(4, 6, 3, 2, padding=1), method), torch.randn(2, 4, 5, 5)
    residual = torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        for _ in range(2):
            assert layer(x, residual, True).dtype == torch.float32
            assert layer(x, residual.double(), True).dtype == torch.float64
            with torch.autocast("cpu", torch.bfloat16):
                assert layer(x, residual).dtype == torch.float32
                assert layer(x, residual.bfloat16()).dtype == torch.bfloat16
    linear, x = with_method(smoothk.LowRankLinear(4, 6, 2), method), torch.randn(2, 3, 4)
    for size in ((3, 6), (2, 1, 6), (3, 1), ()):
        residual = torch.randn(size)
        torch.testing.assert_close(linear(x, residual), linear(x) + residual)


OP_ARGUMENTS = [
    ((2, 8, 7, 6), (5, 8, 3, 3), (12, 5, 1, 1), [1, 1], [1, 1], [1, 1], 1),
    ((2, 8, 7, 6), (6, 4, 3, 1), (12, 3, 1, 3), [2, 1], [1, 2], [1, 2], 2),
    ((2, 8, 9), (5, 8, 3), (12, 5, 1), [2], [1], [1], 1),
]


@pytest.mark.parametrize("shapes", OP_ARGUMENTS, ids=["channel", "spatial", "1d"])
@pytest.mark.parametrize("with_z", [False, True])
@pytest.mark.parametrize("method", ["fused", "pair", "auto"])
def test_the_operator_passes_the_checks_of_torch(shapes: tuple, with_z: bool, method: str) -> None:
    x, v, u = (torch.randn(size, requires_grad=with_z) for size in shapes[:3])
    bias = torch.randn(u.shape[0], requires_grad=with_z)
    for image in (x, x.to(memory_format=torch.channels_last)) if x.dim() == 4 else (x,):
        arguments = (image.detach().requires_grad_(with_z), v, u, bias, None, *shapes[3:], method, False, with_z)
        torch.library.opcheck(torch.ops.smoothk_torch.low_rank_conv, arguments)


def test_the_kernels_operators_pass_the_checks_of_torch() -> None:
    for x_size, v_size, u_size, stride, padding, dilation, groups in OP_ARGUMENTS[:2]:
        v, u = torch.randn(v_size), torch.randn(u_size)
        torch.library.opcheck(torch.ops.smoothk.low_rank_conv_pack, (v, u, groups))
        packed = torch.ops.smoothk.low_rank_conv_pack(v, u, groups)
        x = torch.randn(x_size)
        size = list(smoothk.low_rank_conv2d(x, v, u, None, stride, padding, dilation, groups).shape[2:])
        for channels_last in (False, True):
            options = ([*v_size, *u_size, groups, *stride, *padding, *dilation, *size], True, channels_last, True)
            torch.library.opcheck(torch.ops.smoothk.low_rank_conv_fused, (x, packed, None, None, *options))


def test_the_kernels_operators_check_what_protects_memory() -> None:
    x, v, u = torch.randn(1, 4, 5, 5), torch.randn(2, 4, 3, 3), torch.randn(6, 2, 1, 1)
    packed = torch.ops.smoothk.low_rank_conv_pack(v, u, 1)
    numbers = [2, 4, 3, 3, 6, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 5, 5]

    def call(**changes: Tensor | list[int]) -> None:
        arguments = {"x": x, "packed": packed, "bias": None, "residual": None, "numbers": numbers, **changes}
        torch.ops.smoothk.low_rank_conv_fused(*arguments.values(), False, False, False)

    call()
    for changes, message in (
        ({"x": torch.randn(1, 3, 5, 5)}, "input must be"),
        ({"x": x[0]}, "input must be"),
        ({"x": x.double()}, "dtype must be float32, bfloat16 or float16, got Double"),
        ({"packed": packed[1:]}, "packed must come from low_rank_conv_pack"),
        ({"bias": torch.randn(5)}, "bias must be"),
        ({"residual": torch.randn(1, 6, 5, 4)}, "residual has the wrong shape"),
        ({"residual": torch.randn(1, 6, 5, 5).double()}, "residual must be"),
        ({"numbers": numbers[:-1]}, "numbers must be 17, got 16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**changes)
    with pytest.raises(RuntimeError, match="v and u must be"):
        torch.ops.smoothk.low_rank_conv_pack(v, u, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"stride": [2**62, 1]},
        {"dilation": [2**62, 2**62]},
        {"padding": [2**62, 2**62]},
        {"v": [-2, 4, 3, 3], "u": [6, -2, 1, 1]},
        {"v": [0, 4, 3, 3], "u": [6, 0, 1, 1]},
        {"v": [2**60, 4, 1, 1], "u": [16, 2**60, 1, 1], "packed": 0},
        {"v": [4, 4, 2**60, 1], "u": [16, 4, 1, 1], "packed": 256},
        {"v": [2**62, 4, 3, 3], "u": [2**61, 1, 1, 1], "groups": 2**62},
    ],
    ids=str,
)
def test_the_kernels_operator_refuses_sizes_that_overflow(changes: dict) -> None:
    v, u = changes.get("v", [2, 4, 3, 3]), changes.get("u", [6, 2, 1, 1])
    packed = torch.ops.smoothk.low_rank_conv_pack(torch.randn(2, 4, 3, 3), torch.randn(6, 2, 1, 1), 1)
    packed = torch.zeros(changes["packed"]) if "packed" in changes else packed
    options = [number for name in ("stride", "padding", "dilation") for number in changes.get(name, [1, 1])]
    numbers = [*v, *u, changes.get("groups", 1), *options, 3, 3]
    with pytest.raises(RuntimeError, match="must"):
        torch.ops.smoothk.low_rank_conv_fused(torch.randn(1, 4, 5, 5), packed, None, None, numbers, False, False, False)


def test_sizes_that_the_kernel_leaves_to_the_library() -> None:
    tensors = torch.randn(1, 4, 5, 5), torch.randn(2, 4, 3, 3), torch.randn(6, 2, 1, 1)
    for far in (30_000, 2**61):
        options = {"padding": far, "dilation": far}
        y = smoothk.low_rank_conv2d(*tensors, **options, method="fused")
        torch.testing.assert_close(y, smoothk.low_rank_conv2d(*tensors, **options, method="pair"))
        with pytest.raises(BackendUnavailable, match="does not reach that far"):
            smoothk.low_rank_conv2d(*tensors, **options, backend="cpp")
        rest = [1, 1], [far] * 2, [far] * 2, 1, "fused", False, False
        assert torch.equal(torch.ops.smoothk_torch.low_rank_conv(*tensors, None, None, *rest)[0], y)


def test_an_image_without_pixels_gives_the_bias() -> None:
    x, bias = torch.randn(1, 512, 4, 0), torch.randn(16)
    for v, u in (((80, 512, 3, 1), (16, 80, 1, 3)), ((80, 512, 3, 3), (16, 80, 1, 1))):
        y = smoothk.low_rank_conv2d(x, torch.randn(v), torch.randn(u), bias, padding=(1, 2), method="fused")
        assert torch.equal(y, bias[:, None, None].expand(1, 16, 4, 2))


@pytest.mark.parametrize("method", ["fused", "pair", "merged"])
def test_autocast(method: str) -> None:
    for layer, x in layers():
        layer.method = method
        wanted = expected(layer, x)
        for grad in (False, True):
            with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
                y = layer(x)
            assert y.dtype == torch.bfloat16
            error = (y.double() - wanted).norm() / wanted.norm()
            assert error < 2e-2, (layer, error)
        y.float().sum().backward()
        assert layer.v.grad.dtype == torch.float32


def test_autocast_of_half_precision_input_has_a_kernel() -> None:
    """As all layers but the first get it: the input is bfloat16 and the parameters are float32."""
    x, v, u, bias = torch.randn(1, 3, 5, 5), torch.randn(2, 3, 3, 3), torch.randn(4, 2, 1, 1), torch.randn(4)
    with torch.autocast("cpu", torch.bfloat16):
        y = smoothk.low_rank_conv2d(x.bfloat16(), v, u, bias, backend="cpp")
    wanted = smoothk.low_rank_conv2d(x.double(), v.double(), u.double(), bias.double())
    assert (y.double() - wanted).norm() < 2e-2 * wanted.norm()


@torch_deprecations
def test_transforms_and_forward_derivatives_use_the_pair() -> None:
    layer, x = with_method(smoothk.LowRankConv2d(4, 6, 3, 2, padding=1), "fused"), torch.randn(3, 4, 5, 5)
    with torch.no_grad():
        wanted = layer(x)
        torch.testing.assert_close(torch.func.vmap(layer)(x), wanted)
    tangent = torch.randn_like(x)
    y, slope = torch.func.jvp(layer, (x,), (tangent,))
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(slope, layer(tangent) - layer(torch.zeros_like(x)), rtol=1e-4, atol=1e-5)


def test_threads_share_a_layer() -> None:
    for layer, x in layers():
        layer.method = "fused"
        with torch.no_grad():
            wanted = layer(x)

            def calls(_: int, layer: _LowRank = layer, x: Tensor = x, wanted: Tensor = wanted) -> bool:
                with torch.no_grad():
                    return all(torch.equal(layer(x), wanted) for _ in range(100))

            factor_cache._values.clear()
            with ThreadPoolExecutor(8) as pool:
                assert all(pool.map(calls, range(8)))


def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    for size, channels, rank in (((1, 64, 4, 4), 70, 33), ((3, 48, 17, 13), 40, 20), ((40, 16, 4, 4), 24, 5)):
        for scheme in ("channel", "spatial"):
            layer = with_method(smoothk.LowRankConv2d(size[1], channels, 3, rank, padding=1, scheme=scheme), "fused")
            x = torch.randn(size)
            results = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                with torch.no_grad():
                    results.append(layer(x))
            assert torch.equal(*results)


def test_deterministic_mode() -> None:
    layer, x = with_method(smoothk.LowRankConv2d(8, 8, 3, 4, padding=1), "fused"), torch.randn(2, 8, 6, 6)
    torch.use_deterministic_algorithms(True)
    try:
        grads = []
        for _ in range(2):
            layer.zero_grad()
            layer(x).square().sum().backward()
            grads.append([layer.v.grad, layer.u.grad, layer.bias.grad])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_nan_comes_through() -> None:
    layer, x = with_method(smoothk.LowRankConv2d(4, 6, 3, 2, padding=1), "fused"), torch.zeros(1, 4, 9, 9)
    x[0, 1, 4, 4] = torch.nan
    with torch.no_grad():
        y = layer(x)
        assert torch.equal(y.isnan(), with_method(layer, "pair")(x).isnan())
        assert with_method(layer, "fused")(x, relu=True).isnan().sum() == y.isnan().sum()


def test_an_image_with_gaps_and_one_past_two_to_the_31() -> None:
    layer = with_method(smoothk.LowRankConv2d(2, 3, 3, 2), "fused")
    x = torch.randn(1, 2, 6, 12)[..., ::2]
    far = torch.empty(2**31 + 100, dtype=torch.float32)[: 2**31 + 100].as_strided((1, 2, 6, 6), (0, 2**31, 6, 1))
    far.copy_(x)
    with torch.no_grad():
        for image in (x, far):
            assert_close_rel(layer(image), expected(layer, x), torch.float32)


def test_pickled_and_copied_layers_work() -> None:
    layer, x = with_method(smoothk.LowRankConv2d(4, 6, 3, 2), "fused"), torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        wanted = layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other.method == "fused"
            assert torch.equal(other(x), wanted)


def test_the_pair_is_what_torch_runs() -> None:
    x, v, u = torch.randn(2, 4, 6, 6), torch.randn(3, 4, 3, 3), torch.randn(5, 3, 1, 1)
    wanted = F.conv2d(F.conv2d(x, v, padding=1), u)
    assert torch.equal(smoothk.low_rank_conv2d(x, v, u, padding=1, backend="torch"), wanted)
    assert torch.equal(smoothk.low_rank_conv2d(x, v, u, padding=1, method="pair"), wanted)


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_second_derivatives_are_those_of_the_pair(scheme: str) -> None:
    """The intermediate is an output of the operator: in a second derivative it has a gradient of its own."""
    v_size, u_size = ((3, 4, 3, 3), (5, 3, 1, 1)) if scheme == "channel" else ((3, 4, 3, 1), (5, 3, 1, 3))
    tensors = [torch.randn(size, requires_grad=True) for size in ((2, 4, 6, 5), v_size, u_size)]
    results = []
    for method in ("fused", "pair"):
        y = smoothk.low_rank_conv2d(*tensors, padding=1, method=method)
        firsts = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
        results.append(torch.autograd.grad(sum(first.square().sum() for first in firsts), tensors))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
