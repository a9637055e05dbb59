"""The benchmark refuses what is wrong, counts what it says it counts, and writes what the tables are made from."""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ecosystem_models
import pytest
import torch
from torch import Tensor, nn

from smoothk.backend import unavailable_reason

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
CPU = torch.device("cpu")
needs_the_fused_side = pytest.mark.skipif(unavailable_reason("cpp") is not None, reason="there is no fused side")


pytestmark = pytest.mark.usefixtures("benchmarks_on_path")
module = importlib.import_module


def bench(*arguments: str) -> int:
    return module("bench").main(list(arguments))


def only_case(path: Path) -> dict[str, Any]:
    (case,) = json.loads(path.read_text())["cases"]
    return case


def sides_of(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {side["name"]: side for side in case["sides"]}


# Weight sets


@pytest.mark.parametrize(
    "name, tensors, shapes, millions",
    [("resnet18", 21, 12, 11.16), ("resnet50", 54, 21, 25.50), ("vit_b16", 50, 6, 86.29)],
)
def test_weight_sets_have_the_networks_totals(name: str, tensors: int, shapes: int, millions: float) -> None:
    weights = module("weight_sets").WEIGHT_SETS[name]
    assert (len(weights.shapes), len(set(weights.shapes))) == (tensors, shapes)
    assert round(weights.parameters / 1e6, 2) == millions


def test_largest_set_is_4_gib_of_float32() -> None:
    assert 4 * module("weight_sets").WEIGHT_SETS["4gib"].parameters == 1 << 32


def conv_and_linear(model: nn.Module) -> list[tuple[int, ...]]:
    return sorted(tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))


def test_resnet18_is_that_of_the_recipes() -> None:
    from smoothk.recipes.models import build

    with torch.device("meta"):
        model = build("resnet18", 10)
    assert conv_and_linear(model) == sorted(module("weight_sets").WEIGHT_SETS["resnet18"].shapes)


@pytest.mark.parametrize("name, factory", [("resnet50", "resnet50"), ("vit_b16", "vit_base_patch16_224")])
def test_weight_sets_are_those_of_timm(name: str, factory: str) -> None:
    try:
        timm = ecosystem_models.import_library("timm")
    except ModuleNotFoundError as error:
        pytest.skip(f"needs the extra `full`: {error}")
    with torch.device("meta"):
        model = timm.create_model(factory)
    assert conv_and_linear(model) == sorted(module("weight_sets").WEIGHT_SETS[name].shapes)


# Statistics and scales


def test_spread_and_paired_ratio() -> None:
    timing = module("timing")
    assert timing.spread(range(11)) == {"median": 5, "p10": 1, "p90": 9}
    # The machine slows down half-way: the paired ratio does not see it, the ratio of medians over all would.
    assert timing.paired_ratio([2, 2, 2, 20, 20], [1, 1, 1, 10, 10]) == {"median": 2, "p10": 2, "p90": 2}


def test_every_round_times_every_side_once_in_changing_order() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: (calls.append(name), time.sleep(2e-3)) for name in "abc"}
    before = {"b": lambda: calls.append("before b")}
    samples = module("timing").interleave(runs, CPU, samples=12, budget=60, before=before)
    assert all(len(s.seconds) == len(s.page_faults) == 12 and min(s.seconds) >= 2e-3 for s in samples.values())
    timed = [name for name in calls[-48:]]
    rounds = [[name for name in timed[i : i + 4] if len(name) == 1] for i in range(0, 48, 4)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds) and len(set(map(tuple, rounds))) > 1
    assert all(timed[i - 1] == "before b" for i, name in enumerate(timed) if name == "b")


def test_sampling_ends_with_its_budget() -> None:
    samples = module("timing").interleave({"slow": lambda: time.sleep(0.01)}, CPU, samples=1000, budget=0.02)
    assert 3 <= len(samples["slow"].seconds) < 10


@pytest.mark.parametrize("mebibytes", [0, 8, 40])
def test_peak_memory_is_what_is_held_at_once(mebibytes: int) -> None:
    def run() -> None:
        for _ in range(3):  # one after another: the peak is that of one
            torch.ones(mebibytes << 18).sum()

    run()
    found = module("timing").peak_extra_bytes(run, CPU)
    assert mebibytes << 20 <= found["peak_extra_bytes"] < (mebibytes << 20) + 1000


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not the GNU C library")
def test_freed_memory_is_kept() -> None:
    """In a process of its own: where the heap is depends on all that a process did before."""
    script = """
import timing, torch
def pages_of_a_call():
    # 60 MiB at once, 15,360 pages. Aligned memory fits into what was freed only after some calls.
    run = lambda: [torch.ones(5 << 20) for _ in range(3)]
    return min(timing.sample(run, torch.device("cpu"))[1] for _ in range(30))
fetched = pages_of_a_call()
with timing.freed_memory_kept():
    kept = pages_of_a_call()
print(fetched, kept)
"""
    always_mapped = {"MALLOC_MMAP_THRESHOLD_": "131072"}  # where the function does not change it
    environment = {**os.environ, **always_mapped, "PYTHONPATH": str(Path(module("timing").__file__).parent)}
    command = [sys.executable, "-c", script]
    fetched, kept = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()
    assert float(fetched) > 5000 and float(kept) < 100


def test_memory_that_is_not_torchs_shows_in_the_resident_set() -> None:
    def run() -> None:
        with mmap.mmap(-1, 40 << 20) as pages:  # malloc could hand out memory that is resident already
            pages[:: mmap.PAGESIZE] = bytes(len(pages) // mmap.PAGESIZE)

    found = module("timing").peak_extra_bytes(run, CPU)
    assert found["peak_extra_bytes"] == 0 and found["resident_growth_bytes"] > 39 << 20


# The gate


def wrong(scale: float = 1.0, shift: float = 0.0, write: bool = True, keep: bool = True) -> Callable[..., Any]:
    """A stand-in for `_foreach` that is right but for a factor on one gradient and something added to the value.

    Without ``write`` it leaves the gradients alone, without ``keep`` it overwrites them.
    """
    difference = module("entries.difference")

    def make(penalty: Any, weights: list[nn.Parameter]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            grads = [w.grad if write else w.grad.clone() for w in weights]
            if not keep:
                torch._foreach_zero_(grads)
            before = grads[0].clone()
            value = difference.in_place(penalty, [w.detach() for w in weights], grads)
            grads[0].copy_(before + scale * (grads[0] - before))
            return value + shift

        return run

    return make


def raising(penalty: Any, weights: list[nn.Parameter]) -> Callable[[], Tensor]:
    raise RuntimeError("no such luck\nand a second line")


@pytest.mark.parametrize(
    "side, reason",
    [
        ({"scale": 1.001}, "gradient error"),
        ({"scale": math.nan}, "gradient error nan"),
        ({"shift": 1e-3}, "value error"),
        ({"shift": math.nan}, "value error nan"),
        ({"write": False}, "gradient error"),
        ({"keep": False}, "gradient error"),
        (None, "RuntimeError: no such luck"),
    ],
    ids=str,
)
def test_a_wrong_side_is_red_and_not_timed(
    side: dict[str, Any] | None, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(module("entries.difference"), "_foreach", raising if side is None else wrong(**side))
    arguments = ["difference", "--set", "odd", "--orders", "first", "--samples", "3", "--sides", "foreach", "floor"]
    assert bench(*arguments, "--without", "own process", "--out", str(tmp_path)) == 1
    sides = sides_of(only_case(tmp_path / "difference-odd-cpu.json"))
    assert sides["foreach"]["status"] == "red" and "ms" not in sides["foreach"]
    assert reason in sides["foreach"]["reason"] and "second line" not in sides["foreach"]["reason"]
    assert sides["floor: grad.add_(w)"]["status"] == "timed"
    assert "RED: " + sides["foreach"]["reason"] in capsys.readouterr().out


def test_the_stand_in_is_right_without_its_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module("entries.difference"), "_foreach", wrong())
    assert bench("difference", "--set", "odd", "--gate-only", "--sides", "foreach", "--without", "own process") == 0


@needs_the_fused_side
@pytest.mark.parametrize("block", [1, 100, 1 << 21])
def test_large_weights_are_compared_in_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problems, difference = module("problem"), module("entries.difference")
    monkeypatch.setattr(problems, "BLOCK", block)
    problem = problems.Problem(module("weight_sets").WEIGHT_SETS["odd"], CPU, torch.float32, rotate=False)
    case = difference.case(problem, "both", difference.Penalty(difference.COEFFICIENTS["both"]))
    fused = next(side for side in case.sides if side.name == "fused")
    assert module("harness").gate(fused, case)[0]["status"] == "green"
    problem.copies[0][-1].grad.view(-1)[-1] *= 2
    errors = problem.errors([torch.zeros(())], penalised=True)
    assert errors["gradient"] > 1e-3 and errors["largest entry"] > 1e-3 and errors["value"] == 1


def test_reruns_with_other_bits_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    difference, calls = module("entries.difference"), []

    def unsteady(penalty: Any, name: str | None, weights: list[nn.Parameter]) -> Callable[[], Tensor]:
        run = difference._foreach(penalty, weights)
        return lambda: (calls.append(0), run() * (1 + 2.0**-23 * (len(calls) > 20)))[1]

    monkeypatch.setattr(difference, "_smoothk", unsteady)
    arguments = ["difference", "--set", "odd", "--orders", "first", "--gate-only", "--sides", "fused", "--reruns", "10"]
    assert bench(*arguments, "--without", "autograd", "--out", str(tmp_path)) == 1
    reruns = sides_of(only_case(tmp_path / "difference-odd-cpu.json"))["fused"]["reruns"]
    assert reruns["count"] == 10 and 0 < reruns["identical"] < 10


PENALTIES = [
    (norm, normalized, dim)
    for norm in ("l2", "l1", "l21", "huber")
    for normalized in (False, True)
    for dim in ((0,), (1,), (0, 2, 3))
]


@needs_the_fused_side
@pytest.mark.parametrize("orders", ["first", "second", "both"])
def test_baselines_are_right_for_every_penalty(orders: str) -> None:
    difference, harness = module("entries.difference"), module("harness")
    problem = module("problem").Problem(module("weight_sets").WEIGHT_SETS["odd"], CPU, torch.float64, rotate=False)
    for norm, normalized, dim in PENALTIES:
        penalty = difference.Penalty(difference.COEFFICIENTS[orders], dim, norm, normalized)
        case = difference.case(problem, orders, penalty)
        sides = {side.name: side for side in case.sides}
        in_place = problem.over_copies(
            lambda weights, penalty=penalty: (
                lambda: difference.in_place(penalty, [w.detach() for w in weights], [w.grad for w in weights])
            )
        )
        sides["in place"] = harness.Side("in place", in_place, sides["eager"].check)
        for name in ("fused", "eager", "foreach", "in place", "floor: grad.add_(w)"):
            record, _ = harness.gate(sides[name], case)
            expected = (
                "skipped" if name == "foreach" and penalty != difference.Penalty(penalty.coefficients) else "green"
            )
            assert record["status"] == expected, (case.name, record)


# Results


@needs_the_fused_side
def test_difference_is_measured_written_and_drawn(tmp_path: Path, capsys: Any) -> None:
    arguments = ["difference", "--set", "odd", "--orders", "first", "--samples", "4", "--reruns", "3", "--threads", "1"]
    assert bench(*arguments, "--sides", "fused", "eager", "floor", "--out", str(tmp_path)) == 0
    result = json.loads((tmp_path / "difference-odd-cpu.json").read_text())
    assert result["schema"] == 1 and result["provenance"]["machine"]["threads"] == 1
    assert set(result["provenance"]) >= {"date", "machine", "versions", "git"} and "triton" in result["build"]
    assert result["set"] == {"name": "odd", "title": "odd shapes", "tensors": 9, "parameters": 6376}
    assert [case["name"] for case in result["cases"]] == ["first order, l2"]
    for case in result["cases"]:
        sides = sides_of(case)
        assert set(sides) == {"fused", "fused, autograd", "eager", "eager, own process", "floor: grad.add_(w)"}
        assert case["baseline"] == "fused" and case["bytes"] == 12 * 6376
        assert sides["fused"]["ratio"] == {"median": 1, "p10": 1, "p90": 1}
        assert sides["fused"]["reruns"] == {"count": 3, "identical": 3}
        for side in sides.values():
            assert side["status"] == "timed" and len(side["samples_ms"]) == 4
            assert side["ms"]["p10"] <= side["ms"]["median"] <= side["ms"]["p90"]
            assert all(error <= case["tolerances"][name] for name, error in side["errors"].items())
            assert side["peak_extra_bytes"] >= 0
        eager, fused = sides["eager"], sides["fused"]
        quotients = sorted(a / b for a, b in zip(eager["samples_ms"], fused["samples_ms"], strict=True))
        assert quotients[0] <= eager["ratio"]["median"] <= quotients[-1]
    assert (tmp_path / "difference-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "3 of 3 reruns identical" in capsys.readouterr().out


def test_nuclear_is_checked_on_slow_spectra_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nuclear = module("entries.nuclear")
    arguments = ["nuclear", "--set", "odd", "--samples", "3", "--out", str(tmp_path)]
    assert bench(*arguments) == 0
    sides = sides_of(only_case(tmp_path / "nuclear-odd-cpu.json"))
    assert set(sides) == {"auto", "svd", "eigh", "gram", "polar"}
    assert all(set(side["errors"]) == set(nuclear.TOLERANCES) for side in sides.values())
    # Right for random weights, wrong where singular values are small.
    monkeypatch.setattr(nuclear, "_resolved", lambda s, shape: (s > 0.02 * s.amax(-1, keepdim=True)).unsqueeze(-2))
    assert bench(*arguments, "--sides", "svd", "auto") == 1
    svd = sides_of(only_case(tmp_path / "nuclear-odd-cpu.json"))["svd"]
    assert svd["status"] == "red" and svd["reason"].startswith("gradient on spectra")


@needs_the_fused_side
def test_step_measures_the_overhead(tmp_path: Path) -> None:
    assert bench("step", "--samples", "3", "--batch", "2", "--out", str(tmp_path)) == 0
    whole, alone = json.loads((tmp_path / "step-resnet18-cpu.json").read_text())["cases"]
    assert whole["baseline"] == "none" and set(sides_of(whole)) == {"none", "fused", "eager"}
    assert alone["baseline"] == "fused" and sides_of(alone)["eager"]["ratio"]["median"] > 1


def test_what_does_not_fit_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(module("problem"), "free_bytes", lambda device: 1 << 30)
    assert bench("difference", "nuclear", "step", "--set", "4gib") == 0
    printed = capsys.readouterr().out
    assert "difference, 4 GiB, float32, cpu: skipped, 4 GiB needs 20.0 GiB, 1.0 GiB are free" in printed
    assert "nuclear, 4 GiB, float32, cpu: skipped" in printed and "step, 4 GiB, float32, cpu: skipped" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [(["differences"], "entry must be one of difference, nuclear, step"), (["--set", "vgg"], "invalid choice")],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench(*arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
