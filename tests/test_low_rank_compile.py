"""The low-rank convolution compiled, exported and traced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import smoothk
from smoothk import low_rank_cost
from smoothk.backend import unavailable_reason

torch_deprecations = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of its own functions
cpp_missing = unavailable_reason("cpp")
pytestmark = pytest.mark.skipif(cpp_missing is not None, reason=str(cpp_missing))


@pytest.fixture
def fused_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` takes the kernel, whatever the cost model says."""
    monkeypatch.setattr(low_rank_cost, "fastest", lambda *_: "fused")


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
