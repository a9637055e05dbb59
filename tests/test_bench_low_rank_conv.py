"""The low-rank entries measure the layers they say, refuse what is wrong, and sum up what they wrote."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import smoothk
from smoothk.backend import unavailable_reason
from smoothk.recipes.models import ResNet, build

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
CPU = torch.device("cpu")
TENSORLY = "tensorly-torch, Tucker"


pytestmark = pytest.mark.usefixtures("benchmarks_on_path")
module = importlib.import_module


@pytest.fixture(autouse=True)
def few_copies_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module("entries.low_rank_conv"), "MOST_COPIES", 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bench(*arguments: str) -> int:
    return module("bench").main(list(arguments))


def results(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["cases"]


def sides_of(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {side["name"]: side for side in case["sides"]}


# The layers


def convolutions(model: nn.Module, size: int) -> list[Any]:
    """Every convolution of ``model`` as the benchmark writes it, by running an image through it."""
    layers = []

    def record(conv: nn.Conv2d, arguments: tuple[Tensor]) -> None:
        assert conv.padding == (conv.kernel_size[0] // 2,) * 2 and conv.groups == 1 and conv.bias is None
        geometry = conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], arguments[0].shape[-1]
        layers.append(module("conv_networks").ConvLayer(*geometry))

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(record)
    model(torch.empty(1, 3, size, size, device="meta"))
    return layers


def written(name: str) -> list[Any]:
    network = module("conv_networks").CONV_NETWORKS[name]
    return [layer for count, layer in network.convolutions for _ in range(count)]


def test_resnets_have_the_layers_of_the_modules() -> None:
    def by_name(layers: list[Any]) -> list[str]:
        return sorted(layer.name for layer in layers)

    with torch.device("meta"):
        small, large = build("resnet18", 10), module("conv_networks").ResNet50()
    assert by_name(written("resnet18_cifar")) == by_name(convolutions(small, 32))
    assert by_name(written("resnet50")) == by_name(convolutions(large, 224))
    weights = module("weight_sets").WEIGHT_SETS["resnet50"]
    assert sorted(layer.shape for layer in written("resnet50")) == sorted(s for s in weights.shapes if len(s) == 4)
    assert sum(p.numel() for p in large.parameters()) == 25_557_032


@pytest.mark.parametrize(
    "name, layers, parameters, giga_macs, distinct",
    [
        ("resnet18_cifar", 20, 11_159_232, 0.555, 10),
        ("resnet18", 20, 11_166_912, 1.814, 10),
        ("resnet50", 53, 23_454_912, 4.087, 18),
        ("vgg16", 13, 14_710_464, 15.347, 8),
    ],
)
def test_networks_have_their_totals(name: str, layers: int, parameters: int, giga_macs: float, distinct: int) -> None:
    networks = module("conv_networks")
    network = networks.CONV_NETWORKS[name]
    assert (len(network.shapes), network.parameters) == (layers, parameters)
    assert round(network.macs / 1e9, 3) == giga_macs
    assert len(networks.distinct_layers(network)) == distinct


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
@pytest.mark.parametrize("keep", [0.5, 0.29, 0.1, 1.0])
def test_ranks_are_those_of_from_conv(scheme: str, keep: float) -> None:
    networks, entry = module("conv_networks"), module("entries.low_rank_conv")
    for layer in (networks.ConvLayer(8, 16, 3, 2, 6), networks.ConvLayer(24, 12, 1, 1, 5)):
        conv = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel)
        rank = entry.Setting(layer, keep, 1, "forward", scheme, "nchw").rank
        if rank:
            assert rank == smoothk.LowRankConv2d.from_conv(conv, keep=keep, scheme=scheme).rank
        else:
            with pytest.raises(ValueError, match="for rank 1"):
                smoothk.LowRankConv2d.from_conv(conv, keep=keep, scheme=scheme)


def test_tucker_ranks_keep_the_share() -> None:
    networks, tensorly = module("conv_networks"), module("tensorly_conv")
    for network in networks.CONV_NETWORKS.values():
        for layer in networks.distinct_layers(network):
            r_out, r_in = tensorly.tucker_ranks(layer, 0.3)
            area = layer.kernel**2
            kept = layer.in_channels * r_in + r_in * r_out * area + r_out * layer.out_channels + 2 * area
            assert 0.25 < kept / math.prod(layer.shape) <= 0.3


# The gate


def tiny(monkeypatch: pytest.MonkeyPatch, *rows: tuple[int, ...]) -> None:
    """Small layers in place of the networks'."""
    networks, entry = module("conv_networks"), module("entries.low_rank_conv")
    rows = rows or ((8, 12, 3, 1, 7), (12, 8, 3, 2, 6), (16, 8, 1, 2, 5))
    network = networks.ConvNetwork("tiny", "Tiny", tuple((1, networks.ConvLayer(*row)) for row in rows))
    monkeypatch.setattr(entry, "sets", lambda options: [network])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_side_is_right(dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny(monkeypatch)
    arguments = ["low_rank_conv", "--gate-only", "--keep", "0.4", "--batches", "1", "2", "--dtype", dtype]
    arguments += ["--pass", "forward", "training", "--scheme", "channel", "spatial", "--reruns", "2"]
    assert bench(*arguments, "--layout", "nchw", "channels_last", "--out", str(tmp_path)) == 0
    path = tmp_path / f"low_rank_conv-tiny-cpu{'' if dtype == 'float32' else '-bfloat16'}.json"
    cases = results(path)
    assert len(cases) == 2 * 2 * 2 * (2 + 2 + 1)  # both schemes of a 1x1 kernel are one
    for case in cases:
        sides = sides_of(case)
        training = case["options"]["pass"] == "training"
        assert {"smoothk", "dense", "pair", "dense, channels_last", "pair, channels_last"} <= sides.keys()
        assert ("smoothk, merged" in sides) == training and case["options"]["copies"] == 3
        for name, side in sides.items():
            optional = name == TENSORLY or (name == "smoothk, fused" and unavailable_reason("cpp") is not None)
            assert side["status"] == "green" or optional and side["status"] == "skipped", (case["name"], side)
            assert side["status"] == "skipped" or set(side["errors"]) == set(case["tolerances"])
            assert side["status"] == "skipped" or ("gradient" in side["errors"]) == training


def faulty(fault: str, x: Tensor, v: Tensor, u: Tensor, *rest: Any, **options: Any) -> Tensor:
    """`smoothk.low_rank_conv2d` with a fault."""
    if fault == "stale":  # the factors of the first copy for all
        v = KEPT.setdefault("v", v)
    if fault == "detached":
        u = u.detach() + 0 * u
    y = pair(x, v, u, *rest)
    return y * 1.0001 if fault == "scaled" else y + math.nan if fault == "nan" else y


KEPT: dict[str, Tensor] = {}
pair = smoothk.low_rank_conv2d


@pytest.mark.parametrize("fault", ["none", "scaled", "nan", "stale", "detached"])
def test_a_wrong_side_is_red_and_not_timed(fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    KEPT.clear()
    tiny(monkeypatch, (8, 12, 3, 1, 7))
    monkeypatch.setattr(smoothk, "low_rank_conv2d", partial(faulty, fault))
    mode = "training" if fault == "detached" else "forward"
    arguments = ["low_rank_conv", "--keep", "0.5", "--samples", "3", "--out", str(tmp_path), "--pass", mode]
    assert bench(*arguments, "--without", "fused", "merged", "tensorly") == (fault != "none")
    (case,) = results(tmp_path / "low_rank_conv-tiny-cpu.json")
    sides = sides_of(case)
    assert sides["pair"]["status"] == "timed" and sides["pair"]["samples"] == 3
    assert sides["smoothk"]["status"] == ("timed" if fault == "none" else "red")
    assert ("ms" in sides["smoothk"]) == (fault == "none")


def test_large_and_impossible_cases_are_left_out_and_named(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    tiny(monkeypatch, (8, 12, 3, 1, 7), (8, 12, 1, 1, 7))
    arguments = ["low_rank_conv", "--gate-only", "--keep", "0.15", "--sides", "pair"]
    assert bench(*arguments, "--most-gflop", "2e-5") == 0
    printed = capsys.readouterr().out
    assert "left out: 3×3 8→12 7², 15 % kept, batch 1, forward: 0 GFLOP a call, --most-gflop 2e-05" in printed
    assert "left out: 1×1 8→12 7², 15 % kept, batch 1, forward: not even rank 1 is that small" in printed
    assert bench(*arguments, "--layers", "1×1") == 0 and "3×3" not in capsys.readouterr().out


# Whole networks


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    models = module("entries.low_rank_models")

    def make() -> nn.Module:
        return ResNet((1, 1), 8, 10)

    compress = partial(models.every_3x3, 0.3)
    monkeypatch.setattr(models, "sets", lambda options: [models.Network("small", "Small", 8, make, compress)])


def test_networks_are_measured_and_drawn(small_network: None, tmp_path: Path) -> None:
    arguments = ["low_rank_models", "--batches", "1", "2", "--samples", "3", "--out", str(tmp_path)]
    assert bench(*arguments) == 0
    latency, throughput, training = results(tmp_path / "low_rank_models-small-cpu.json")
    assert [case["name"] for case in (latency, throughput, training)] == [
        "forward, batch 1",
        "forward, batch 2",
        "training, batch 2",
    ]
    optimised = {"smoothk, optimised", "smoothk, optimised, channels_last"}
    folded = {f"{name}, folded{layout}" for name in ("dense", "pair") for layout in ("", ", channels_last")}
    plain = {f"{name}{layout}" for name in ("smoothk", "dense", "pair") for layout in ("", ", channels_last")}
    assert set(sides_of(latency)) == plain | folded | optimised and set(sides_of(training)) == plain
    for case in (latency, throughput, training):
        assert 0 < case["options"]["macs_kept"] < 0.5 and 0 < case["options"]["parameters_kept"] < 0.5
        for name, side in sides_of(case).items():
            allowed = {"timed", "skipped"} if name in optimised else {"timed"}
            assert side["status"] in allowed, side
    if not hasattr(smoothk, "optimize_for_inference"):
        assert "has no optimize_for_inference" in sides_of(latency)["smoothk, optimised"]["reason"]
    assert (tmp_path / "low_rank_models-cpu.png").read_bytes().startswith(b"\x89PNG")
    table = module("low_rank_speed").model_table([json.loads(p.read_text()) for p in tmp_path.glob("*.json")])
    assert [row[0] for row in table.rows][-3:] == ["MACs kept", "parameters kept", "peak memory, smoothk ÷ pair"]


def test_a_wrong_network_is_red(small_network: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models = module("entries.low_rank_models")
    fold = models.fold

    def wrong(model: nn.Module) -> nn.Module:
        folded = fold(model)
        with torch.no_grad():
            next(iter(folded.parameters())).mul_(1.001)
        return folded

    monkeypatch.setattr(models, "fold", wrong)
    monkeypatch.setattr(smoothk, "optimize_for_inference", lambda model: model, raising=False)
    arguments = ["low_rank_models", "--pass", "forward", "--batches", "2", "--gate-only", "--out", str(tmp_path)]
    assert bench(*arguments) == 1
    (case,) = results(tmp_path / "low_rank_models-small-cpu.json")
    statuses = {name: side["status"] for name, side in sides_of(case).items()}
    assert {name for name, status in statuses.items() if status == "red"} == {n for n in statuses if "folded" in n}
    assert statuses["smoothk, optimised"] == "green"


def test_a_macs_budget_is_met() -> None:
    models = module("entries.low_rank_models")
    network = models.Network("s", "S", 8, lambda: ResNet((1, 1), 8, 10), partial(models.by_macs, 0.5))
    problem = models.Problem(network, CPU, torch.float32)
    assert 0.3 < problem.kept["macs_kept"] <= 0.5 and problem.macs == problem.kept["macs"]
    with torch.no_grad():
        x = torch.randn(2, 3, 8, 8)
        merged = F.cosine_similarity(problem.small(x), models.in_sequence(problem.small)(x))
    assert merged.min() > 0.9999


# What is made of the results


def record(layer: str, ratios: dict[str, float], **options: Any) -> dict[str, Any]:
    """A case as `bench.py` writes it."""
    options = {
        "layer": layer,
        "pass": "forward",
        "batch": 1,
        "keep": 0.3,
        "scheme": "channel",
        "layout": "nchw",
    } | options
    sides = [
        {"name": name, "ratio": {"median": ratio}, "errors": {"output": 1e-7 * ratio}, "samples_ms": [1.0]}
        for name, ratio in {"smoothk": 1.0, **ratios}.items()
    ]
    return {"name": f"{layer}, and so on", "baseline": "smoothk", "options": options, "sides": sides}


def layers() -> list[dict[str, Any]]:
    return [
        record("a", {"dense": 4, "pair": 2, "dense, channels_last": 0.5, "pair, channels_last": 0.5}),
        record("b", {"dense": 1, "pair": 0.8, TENSORLY: 3}),
        record("c", {"dense": 9, "pair": 8}, keep=0.5),
        record("a", {"dense, channels_last": 2, "pair, channels_last": 1.6, "dense": 9}, layout="channels_last"),
        record("a", {"dense": 3, "pair": 2, "smoothk, merged": 0.5}, **{"pass": "training"}),
        {**record("d", {"dense": 0.1}), "baseline": "pair"},
    ]


def test_layer_table_is_of_geometric_means_and_the_worst_layer() -> None:
    table = module("low_rank_speed").layer_table([{"cases": layers()}])
    rows = {(row[0], row[2]): row[3:] for row in table.rows}
    assert set(rows) == {
        ("forward", "30 %"),
        ("forward", "50 %"),
        ("forward, channels_last", "30 %"),
        ("training", "30 %"),
    }
    count, dense, by_pair, tensorly, worst = rows["forward", "30 %"]
    assert count == 2 and (dense, tensorly) == pytest.approx((2, 3))
    assert by_pair == pytest.approx(math.sqrt(1.6)) and worst == "1.25 (b)"
    assert rows["forward, channels_last", "30 %"][1:3] == pytest.approx([2, 1.6])
    assert rows["training", "30 %"][-1] == "2.00 (a)"


def test_targets_are_read_from_the_results(tmp_path: Path) -> None:
    kept = {"macs_kept": 0.295, "parameters_kept": 0.4}
    model = [record("m", {"dense": 2.5, "pair": 1.3}, batch=batch, **kept) for batch in (1, 32)]
    for side in (side for case in model for side in case["sides"]):
        side["peak_extra_bytes"] = {"smoothk": 7, "pair": 10}.get(side["name"], 0)
    written = {
        "low_rank_conv-x-cpu": ("x", layers()[:4]),
        "low_rank_models-resnet18_macs-cpu": ("resnet18_macs", model),
    }
    for name, (set_name, cases) in written.items():
        result = {"dtype": "float32", "set": {"name": set_name, "title": "t", "parameters": 1}, "cases": cases}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    speed = module("low_rank_speed")
    measured = {row[0]: row[3] for row in speed.targets(tmp_path).rows}
    assert measured["3×3 at 28 %, batch 1: dense ÷ smoothk"] is None
    assert measured["30 % of MACs: MACs kept, %"] == pytest.approx(29.5)
    assert measured["the same, batch 32: dense ÷ smoothk"] == 2.5
    assert measured["the same, batch 1: pair ÷ smoothk"] == 1.3
    assert measured["layers, batch 1: pair ÷ smoothk, geometric mean"] == pytest.approx((2 * 0.8 * 8) ** (1 / 3))
    assert measured["worst layer: smoothk ÷ min(dense, pair, merged)"] == 1.25
    assert measured["worst layer"] == "b, and so on" and measured["largest error to float64"] == 1e-7
    assert measured["peak memory, batch 1: smoothk ÷ pair"] == 0.7
    speed.draw(tmp_path, "low_rank_conv", "cpu")
    assert (tmp_path / "low_rank_conv-cpu.png").read_bytes().startswith(b"\x89PNG")


def test_options_of_both_entries_are_told_apart(capsys: Any) -> None:
    parser = module("bench").build_parser()
    args = parser.parse_args(["low_rank_conv", "--pass", "training", "--batches", "8"])
    assert args.passes == ["training"] and args.batches == [8] and args.batch is None
    with pytest.raises(SystemExit):
        parser.parse_args(["--networks", "alexnet"])
    assert "invalid choice" in capsys.readouterr().err


def test_only_three_channels_and_earlier_layers_are_not_distinct() -> None:
    networks = module("conv_networks")
    first, *others = networks.CONV_NETWORKS.values()
    assert networks.distinct_layers(replace(first, name="another")) == networks.distinct_layers(first)
    everything = [layer for network in (first, *others) for layer in networks.distinct_layers(network)]
    assert len(everything) == len(set(everything)) == 46
