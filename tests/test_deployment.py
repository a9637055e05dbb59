"""Whole compressed models on their way out: compiled, exported, run by ONNX Runtime and AOTInductor, quantised."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import smoothk
from smoothk.decompress import FactorPair
from smoothk.layers import _LowRank
from smoothk.recipes import models


class Transformer(nn.Module):
    """Patches, two encoder layers of torch's own, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).mT).mean(1))


def residual() -> nn.Module:
    """ResNet-18, an eighth as wide, with statistics in its batch norms."""
    model = models.build("resnet18", num_classes=10, in_channels=3, width=0.125)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {"resnet18": residual, "transformer": Transformer}
EVERY = pytest.mark.parametrize("name", MODELS)
INDUCTOR = pytest.mark.filterwarnings(  # of torch, about itself
    "ignore:.*torch.jit.script_method.*:DeprecationWarning", "ignore:.*LeafSpec.*:FutureWarning"
)
SLOW_IF_LARGE = pytest.mark.parametrize("name", [pytest.param("resnet18", marks=pytest.mark.slow), "transformer"])


@functools.cache
def dense_and_small(name: str) -> tuple[nn.Module, nn.Module]:
    """A model and a compressed one of it in evaluation mode, without gradients; images ``[N, 3, 16, 16]`` go in."""
    dense = MODELS[name]().eval().requires_grad_(False)
    return dense, smoothk.compress(dense, 0.5).model


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))


def low_rank_layers(model: nn.Module) -> list[_LowRank]:
    return [module for module in model.modules() if isinstance(module, _LowRank)]


def assert_close(actual: Tensor, expected: Tensor, limit: float = 1e-5) -> None:
    """Within ``limit`` of each other, in units of the largest entry if that is above 1."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= limit * expected.abs().max().clamp_min(1)


def graphs_of(model: nn.Module, backend: str) -> int:
    """How many graphs there are after calls with several batch sizes, of which one would do, all of them right."""
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for batch in (4, 2, 7, 11, 16):
        assert_close(compiled(images(batch)), model(images(batch)))
    return len(graphs)


@SLOW_IF_LARGE
def test_compiles_to_one_graph_without_more_of_them_than_the_dense_model(name: str) -> None:
    """Torch's own convolutions make a new graph from 16 images on."""
    dense, small = dense_and_small(name)
    assert graphs_of(small, "eager") <= graphs_of(dense, "eager")


@pytest.mark.slow
@INDUCTOR
@EVERY
def test_compiles_with_inductor(name: str) -> None:
    torch.backends.mha.set_fastpath_enabled(False)  # torch is wrong about the strides that its fused layer gives
    try:
        graphs_of(dense_and_small(name)[1], "inductor")
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.slow
@INDUCTOR
def test_training_compiles_with_inductor() -> None:
    """Gradients of a compiled compressed model are those of the model."""
    torch._dynamo.reset()
    model = models.build("digits_net", num_classes=10, in_channels=3, width=0.25)
    small = smoothk.compress(model, 0.5).model.eval()
    compiled = torch.compile(small, fullgraph=True, dynamic=True)
    for batch in (4, 6):
        expected = torch.autograd.grad(small(images(batch)).square().sum(), list(small.parameters()))
        actual = torch.autograd.grad(compiled(images(batch)).square().sum(), list(small.parameters()))
        for ours, theirs in zip(actual, expected, strict=True):
            assert_close(ours, theirs, 1e-4)


def exported(small: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(small, (images(4),), dynamic_shapes=({0: torch.export.Dim("batch")},))


@EVERY
def test_exports_with_any_batch_size(name: str) -> None:
    _, small = dense_and_small(name)
    program = exported(small)
    for batch in (1, 4, 9):
        assert_close(program.module()(images(batch)), small(images(batch)))
    assert not any("smoothk" in str(node.target) for node in program.graph.nodes)  # readable without this package


@SLOW_IF_LARGE
def test_onnx_runtime_agrees(name: str, tmp_path: Path) -> None:
    _, small = dense_and_small(name)
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = str(tmp_path / "small.onnx")
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter itself, about its own future
        torch.onnx.export(small, (images(4),), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for size in (1, 4, 9):
        (actual,) = session.run(None, {name: images(size).numpy()})
        assert_close(torch.from_numpy(actual), small(images(size)))


@pytest.mark.slow
@INDUCTOR
@EVERY
def test_aotinductor_package(name: str, tmp_path: Path) -> None:
    _, small = dense_and_small(name)
    package = torch._inductor.aoti_compile_and_package(exported(small), package_path=str(tmp_path / "small.pt2"))
    run = torch._inductor.aoti_load_package(package)
    for batch in (1, 4, 9):
        assert_close(run(images(batch)), small(images(batch)))


# --- quantisation -----------------------------------------------------------------------------------------------------


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def test_dynamic_quantisation_takes_both_factors() -> None:
    model = smoothk.compress(perceptron(), 0.6).model.eval()
    x = torch.randn(16, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated in favour of torchao
        quantised = torch.ao.quantization.quantize_dynamic(smoothk.to_sequential(model), {nn.Linear})
        assert not low_rank_layers(quantised)
        factors = [m for m in quantised.modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
        dense = len([m for m in model.modules() if isinstance(m, nn.Linear)])
        assert len(factors) == 2 * len(low_rank_layers(model)) + dense
        assert 0 < error(quantised(x), model(x)) < 0.05


@pytest.mark.parametrize("norm_first", [True, False])
def test_dynamic_quantisation_of_a_transformer_layer(norm_first: bool) -> None:
    """Attention reads the weight of its output layer in place of calling it."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = smoothk.compress(layer, 0.7, method="uniform").model.train()  # evaluation mode: one op on float weights
    assert isinstance(model.self_attn.out_proj, _LowRank) and isinstance(model.linear1, _LowRank)
    x = torch.randn(2, 6, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(smoothk.to_sequential(model), {nn.Linear})
    assert isinstance(quantised.linear1[1], torch.ao.nn.quantized.dynamic.Linear)
    with torch.no_grad():
        assert 0 < error(quantised(x), model(x)) < 0.05


@pytest.mark.slow
def test_torchao_takes_both_factors() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = smoothk.compress(perceptron(), 0.6).model.eval()
    quantised = smoothk.to_sequential(model)
    torchao.quantize_(quantised, torchao.Int8WeightOnlyConfig())
    pairs = [m for m in quantised.modules() if isinstance(m, FactorPair)]
    assert len(pairs) == len(low_rank_layers(model)) > 0
    assert all(type(factor.weight) is not nn.Parameter for pair in pairs for factor in pair)
    x = torch.randn(16, 64)
    assert 0 < error(quantised(x), model(x)) < 0.05
