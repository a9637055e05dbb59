"""The low-rank convolution in PyTorch: operators, compilation, export, autocast, threads, and what it keeps."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close_rel
from torch import Tensor, nn

import smoothk
from smoothk import factor_cache, low_rank_cost, repeated_call
from smoothk.backend import BackendUnavailable, unavailable_reason
from smoothk.layers import _LowRank
from smoothk.repeated_call import RepeatedCall

torch_deprecations = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of its own functions
cpp_missing = unavailable_reason("cpp")
pytestmark = [
    pytest.mark.skipif(cpp_missing is not None, reason=str(cpp_missing)),
    # torch says so of its own layers, too.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),
]


@pytest.fixture
def fused_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` takes the kernel, whatever the cost model says."""
    monkeypatch.setattr(low_rank_cost, "fastest", lambda *_: "fused")


def layers() -> Iterator[tuple[_LowRank, Tensor]]:
    """A layer of each kind that has a kernel, and an input."""
    yield smoothk.LowRankConv2d(8, 12, 3, 5, padding=1), torch.randn(2, 8, 7, 6)
    yield smoothk.LowRankConv2d(8, 12, 3, 5, stride=2, padding=1, scheme="spatial"), torch.randn(2, 8, 7, 6)
    yield smoothk.LowRankConv2d(8, 12, (4, 2), 3, padding="same", groups=2, bias=False), torch.randn(2, 8, 7, 6)
    yield smoothk.LowRankConv2d(6, 4, 3, 3, padding=1, padding_mode="reflect"), torch.randn(1, 6, 5, 5)
    yield smoothk.LowRankConv1d(8, 12, 3, 5, padding=1), torch.randn(2, 8, 9)
    yield smoothk.LowRankLinear(8, 12, 5), torch.randn(2, 3, 8)


def expected(layer: _LowRank, x: Tensor) -> Tensor:
    """The dense layer in float64."""
    dense = layer.to_linear() if isinstance(layer, smoothk.LowRankLinear) else layer.to_conv()
    dense.weight = nn.Parameter(copy.deepcopy(layer).double().weight)
    return dense.double()(x.double())


def with_method(layer: _LowRank, method: str) -> _LowRank:
    layer.method = method
    return layer


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


@torch_deprecations
def test_compiled_without_a_graph_break_for_every_batch_size(fused_everywhere: None) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(
        smoothk.LowRankConv2d(3, 8, 3, 3, padding=1),
        nn.ReLU(),
        smoothk.LowRankConv2d(8, 8, 3, 4, stride=2, padding=1, scheme="spatial"),
        nn.Flatten(2),
        smoothk.LowRankConv1d(8, 6, 3, 4),
        nn.Flatten(),
        smoothk.LowRankLinear(6 * 14, 5, 3),
    )
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch in (2, 3, 7):
        x = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
        grads = []
        for run in (compiled, model):
            model.zero_grad()
            run(x).square().sum().backward()
            grads.append([p.grad for p in model.parameters()])
        for actual, wanted in zip(*grads, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@torch_deprecations
def test_compiled_code_sees_new_factors(fused_everywhere: None) -> None:
    torch._dynamo.reset()
    layer, x = smoothk.LowRankConv2d(3, 8, 3, 3, padding=1), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        compiled(x)
        layer.v.mul_(2)
        torch.testing.assert_close(compiled(x), layer.to_conv()(x))


def test_exported_programs_hold_library_convolutions(fused_everywhere: None) -> None:
    convs = smoothk.LowRankConv2d(3, 8, 3, 3, padding=1), smoothk.LowRankConv2d(8, 4, 3, 2)
    model = nn.Sequential(convs[0], nn.ReLU(), convs[1]).eval()
    x = torch.randn(2, 3, 8, 8)
    dynamic = {"input": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("conv" in name for name in names)
    assert not any("smoothk" in name for name in names)
    larger = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(program.module()(larger), model(larger))


@torch_deprecations
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's own exporter
def test_onnx_programs_hold_standard_operators(fused_everywhere: None, tmp_path: Path) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    convs = smoothk.LowRankConv2d(3, 8, 3, 3, padding=1), smoothk.LowRankConv2d(8, 4, 3, 2, scheme="spatial")
    model = nn.Sequential(*convs, nn.Flatten(), smoothk.LowRankLinear(4 * 36, 5, 2)).eval()
    dynamic = {"input": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.onnx.export(model, (torch.randn(2, 3, 8, 8),), dynamo=True, dynamic_shapes=dynamic, verbose=False)
    path = tmp_path / "model.onnx"
    program.save(path)
    assert {node.domain for node in onnx.load(path).graph.node} == {""}
    session, x = onnxruntime.InferenceSession(path), torch.randn(5, 3, 8, 8)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=0, atol=1e-5)


@torch_deprecations
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_programs_hold_library_convolutions(fused_everywhere: None) -> None:
    layer, x = smoothk.LowRankConv2d(3, 8, 3, 3, padding=1).eval(), torch.randn(2, 3, 8, 8)
    traced = torch.jit.trace(layer, x)
    assert "smoothk_torch::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x[:1]), layer(x[:1]))


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


def test_a_layer_made_in_inference_mode() -> None:
    with torch.inference_mode():
        layer = with_method(smoothk.LowRankConv2d(4, 6, 3, 2), "fused")
        x = torch.randn(1, 4, 5, 5)
        for _ in range(2):
            wanted = smoothk.low_rank_conv2d(x, layer.v, layer.u, layer.bias, method="pair")
            torch.testing.assert_close(layer(x), wanted)
            layer.v.mul_(2)


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


@pytest.mark.parametrize("kind", ["write", "data", "replace", "load", "optimizer", "inference"])
def test_what_is_kept_follows_the_factors(kind: str) -> None:
    def change(layer: _LowRank) -> None:
        with torch.no_grad():
            if kind == "write":
                layer.u.mul_(2)
            elif kind == "data":
                layer.v.data.add_(0.5)
            elif kind == "replace":
                layer.v = nn.Parameter(torch.randn_like(layer.v))
            elif kind == "load":
                layer.load_state_dict({name: torch.randn_like(value) for name, value in layer.state_dict().items()})
        if kind == "optimizer":
            layer.v.grad = torch.ones_like(layer.v)
            torch.optim.SGD([layer.v], lr=0.1).step()
        if kind == "inference":
            with torch.inference_mode():
                layer.v.add_(1)

    for method in ("fused", "merged"):
        for layer, x in layers():
            layer.method = method
            with torch.no_grad():
                layer(x)
                change(layer)
                assert_close_rel(layer(x), expected(layer, x), torch.float32)


@pytest.mark.parametrize("method", ["fused", "pair"])
def test_a_repeated_call_follows_what_is_changed(method: str) -> None:
    """The second call of a layer takes a shorter way."""
    layer = with_method(smoothk.LowRankConv2d(4, 6, 3, 2, padding=1), method)
    x = torch.randn(2, 4, 8, 8)

    def check(x: Tensor) -> None:
        wanted = expected(layer, x)
        for residual, relu in ((None, False), (torch.randn(wanted.shape), True), (torch.randn(6, 1, 1), False)):
            added = wanted if residual is None else wanted + residual.double()
            actual = layer(x, residual, relu)
            assert_close_rel(actual, added.relu() if relu else added, torch.float32)

    with torch.no_grad():
        layer(x)
        first = factor_cache.kept(layer.v, RepeatedCall)
        layer(torch.randn_like(x))
        assert factor_cache.kept(layer.v, RepeatedCall) is first
        check(x)
        check(torch.randn_like(x))
        for name, value in (("stride", (2, 2)), ("padding", (0, 0)), ("dilation", (2, 2))):
            setattr(layer, name, value)
            check(x)
        for other in (x[:1], x[..., :6], x.to(memory_format=torch.channels_last), x[0]):
            check(other)
            check(other)
        layer.bias = nn.Parameter(torch.randn(6))
        check(x)
        layer.method = "merged"
        check(x)
        layer.method = "fused"
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_a_write_while_a_call_is_kept_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = with_method(smoothk.LowRankConv2d(4, 6, 3, 2), "fused"), torch.randn(1, 4, 5, 5)
    arguments = repeated_call.kernel_arguments

    def written_to(*call: object) -> object:
        result = arguments(*call)
        layer.v.mul_(2)  # as by another thread
        return result

    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(repeated_call, "kernel_arguments", written_to)
        layer(x)
    with torch.no_grad():
        assert_close_rel(layer(x), expected(layer, x), torch.float32)


def test_writes_through_data_to_large_factors_are_seen() -> None:
    layer, x = with_method(smoothk.LowRankConv2d(64, 64, 3, 32, padding=1), "fused"), torch.randn(1, 64, 4, 4)
    with torch.no_grad():
        layer(x)
        layer.v.data.copy_(torch.randn_like(layer.v))
        assert_close_rel(layer(x), expected(layer, x), torch.float32)
        layer.u.data.mul_(0.5)
        assert_close_rel(layer(x), expected(layer, x), torch.float32)


def test_factors_are_packed_once_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    packs = []
    pack = torch.ops.smoothk.low_rank_conv_pack
    monkeypatch.setattr(torch.ops.smoothk, "low_rank_conv_pack", lambda *a: packs.append(1) or pack(*a))
    layer, x = with_method(smoothk.LowRankConv2d(4, 6, 3, 2, padding=1), "fused"), torch.randn(3, 4, 5, 5)
    gc.collect()
    before = len(factor_cache._values)
    with torch.no_grad():
        for batch in (1, 2, 3):
            layer(x[:batch])
    assert len(packs) == 1
    assert len(factor_cache._values) == before + 1
    del layer
    gc.collect()
    assert len(factor_cache._values) == before


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
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
            assert other.method == "fused"
            assert torch.equal(other(x), wanted)


def test_the_pair_is_what_torch_runs() -> None:
    x, v, u = torch.randn(2, 4, 6, 6), torch.randn(3, 4, 3, 3), torch.randn(5, 3, 1, 1)
    wanted = F.conv2d(F.conv2d(x, v, padding=1), u)
    assert torch.equal(smoothk.low_rank_conv2d(x, v, u, padding=1, backend="torch"), wanted)
    assert torch.equal(smoothk.low_rank_conv2d(x, v, u, padding=1, method="pair"), wanted)
