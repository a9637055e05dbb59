"""Layers, compression and penalties where a model lives: on a GPU where there is one, by the kernels that are not
chosen there by themselves yet, and on the CPU, so that the tests themselves are right."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import smoothk
from smoothk import LowRankConv2d, LowRankLinear, backend

# Of the output and gradients, relative; float32 goes through the tensor cores as TF32, and libraries may do so too.
TOLERANCES = {torch.float32: 3e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
SHAPES = ((16, 32, 3, 1), (32, 24, 3, 2), (64, 64, 1, 1), (8, 40, 5, 1))  # channels in and out, kernel, stride


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    kernel = "cuda" if request.param == "cuda" else "cpp"
    if backend.unavailable_reason(kernel) is not None:
        pytest.skip(str(backend.unavailable_reason(kernel)))
    if request.param == "cuda":
        monkeypatch.setattr(backend, "UNVERIFIED", set())
    yield request.param


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.detach().cpu().double() - expected).norm() / expected.norm()).item()


def layers(dtype: torch.dtype, device: str, scheme: str = "channel") -> Iterator[tuple[nn.Module, nn.Module, Tensor]]:
    """Low-rank layers on the device by the kernel, the same in float64 on the CPU, and an input."""
    for c_in, c_out, kernel, stride in SHAPES:
        conv = nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2).to(dtype)
        exact = LowRankConv2d.from_conv(conv, rank=min(c_in, 17), scheme=scheme if kernel > 1 else "channel")
        layer = copy.deepcopy(exact).to(device)
        layer.method = "fused"
        yield layer, exact.double(), torch.randn(3, c_in, 11, 9).to(dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_outputs_and_gradients_of_layers(dtype: torch.dtype, scheme: str, device: str) -> None:
    for layer, exact, x in layers(dtype, device, scheme):
        here, there = x.to(device, copy=True).requires_grad_(), x.double().requires_grad_()
        assert relative(layer(here.detach()), exact(there).detach()) <= TOLERANCES[dtype]
        y, expected = layer(here), exact(there)
        assert y.dtype == dtype and y.device.type == device
        y.backward(torch.ones_like(y)), expected.backward(torch.ones_like(expected))
        assert relative(here.grad, there.grad) <= TOLERANCES[dtype]
        for ours, theirs in zip(layer.parameters(), exact.parameters(), strict=True):
            assert relative(ours.grad, theirs.grad) <= TOLERANCES[dtype]


def test_the_kernel_is_what_runs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from smoothk import low_rank_ops

    calls: list[bool] = []
    fused = low_rank_ops._fused
    monkeypatch.setattr(low_rank_ops, "_fused", lambda *a: calls.append(a[0].is_cuda) or fused(*a))
    for layer, _, x in layers(torch.float16, device):
        with torch.no_grad():
            layer(x.to(device))
    assert calls == [device == "cuda"] * len(SHAPES)


def test_linear_layers(device: str) -> None:
    linear = nn.Linear(48, 40)
    exact = LowRankLinear.from_linear(linear, rank=12)
    layer, x = copy.deepcopy(exact).to(device), torch.randn(5, 7, 48)
    assert relative(layer(x.to(device)), exact.double()(x.double()).detach()) <= TOLERANCES[torch.float32]


def network() -> nn.Module:
    torch.manual_seed(1)
    widths, parts = (3, 16, 32, 32), []
    for c_in, c_out in zip(widths, widths[1:], strict=False):
        parts += [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 24))


def test_compression_is_that_of_the_cpu(device: str) -> None:
    model, images = network().eval(), torch.randn(4, 3, 16, 16)
    there = smoothk.compress(model, keep=0.4)
    here = smoothk.compress(copy.deepcopy(model).to(device), keep=0.4)
    plans = [{name: entry.rank for name, entry in result.plan.layers.items()} for result in (here, there)]
    assert plans[0] == plans[1] and any(plans[0].values())
    expected = there.model.double()(images.double()).detach()
    for form in (lambda m: m, smoothk.optimize_for_inference):
        small = form(here.model)
        assert all(parameter.device.type == device for parameter in small.parameters())
        with torch.inference_mode():
            assert relative(small(images.to(device)), expected) <= 1e-2
    smoothk.recalibrate_batch_norm(here.model, [images.to(device)])
    table = smoothk.tune(here.model, images.to(device), budget=1e-3, verbose=False)
    assert len(table.rows) == sum(isinstance(m, LowRankConv2d | LowRankLinear) for m in here.model.modules())


def test_synthetic_inputs_are_made_where_the_model_is(device: str) -> None:
    model = smoothk.recalibrate_batch_norm(network().eval(), [torch.randn(64, 3, 16, 16)]).to(device)
    inputs = smoothk.synthesize_inputs(model, (3, 16, 16), count=64, steps=10)
    assert all(batch.device.type == device for batch in inputs)
    small = smoothk.compress(model, keep=0.4, calibration=inputs).model
    assert relative(small(inputs[0]), model(inputs[0]).double()) <= 0.2


PENALTIES: dict[str, dict[str, object]] = {
    "first and second order": {"first_order": 0.1, "second_order": 0.05},
    "rows, both axes": {"first_order": 0.1, "norm": "l21", "dim": (0, 1)},
    "normalised": {"first_order": 0.1, "norm": "huber", "normalized": True},
    "nuclear": {"first_order": 0.0, "nuclear": 0.1, "method": "polar", "unfolding": "spatial"},
}


@pytest.mark.parametrize("options", PENALTIES.values(), ids=PENALTIES)
def test_penalties_of_a_network(options: dict[str, object], device: str) -> None:
    model = network()
    exact = copy.deepcopy(model).double()
    model = model.to(device, memory_format=torch.channels_last)
    penalty, wanted = smoothk.SmoothnessPenalty(model, **options), smoothk.SmoothnessPenalty(exact, **options)
    penalty().backward()
    added = penalty.accumulate_grad()
    expected = wanted()
    (2 * expected).backward()
    assert abs(added.item() / expected.item() - 1) <= 1e-4
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            assert relative(ours.grad, theirs.grad) <= 5e-3


def test_threads_get_the_same_bits(device: str) -> None:
    pairs = [(layer, x.to(device)) for layer, _, x in layers(torch.float16, device)]

    def outputs(_: int) -> list[Tensor]:
        with torch.no_grad():
            return [layer(x) for layer, x in pairs]

    first = outputs(0)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(outputs, range(80)):
            assert all(map(torch.equal, found, first))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of its own functions
def test_compiles_into_one_graph(device: str) -> None:
    for layer, exact, x in layers(torch.float32, device):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert relative(compiled(x.to(device)), exact(x.double()).detach()) <= TOLERANCES[torch.float32]


def captured(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # not the default one: a kernel on another stream than its input is seen
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_follows_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "UNVERIFIED", set())
    for layer, _, x in layers(torch.bfloat16, "cuda"):
        x = x.to("cuda")
        with torch.no_grad():
            graph, y = captured(lambda layer=layer, x=x: layer(x))
            for seed in range(3):
                x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
                graph.replay()
                replayed = y.clone()
                assert torch.equal(replayed, layer(x))
