"""`smoothk.plan_ranks` and `RankPlanner`: budgets, methods, refusals."""

from __future__ import annotations

import copy
import math
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import numpy_reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import MODELS, REFUSED, parameter_count, perceptron, tied
from torch import Tensor, nn

import smoothk
from smoothk import LowRankConv2d, LowRankLinear, RankPlan, RankPlanner, plan_ranks, ranks
from smoothk.macs import count_macs
from smoothk.ranks import METHODS, SCHEMES

COSTS = ("params", "macs")  # "latency" has tests/test_latency.py


def smallest_keep(model: nn.Module, **options) -> float:
    """What the message for an impossible ``keep`` names."""
    with pytest.raises(ValueError, match=r"keep must be at least 0\.\d+ for this model, got 1e-09") as error:
        plan_ranks(model, 1e-9, **options)
    return float(re.search(r"at least (\S+)", str(error.value))[1])


def cost_of(plan: RankPlan) -> tuple[int, int]:
    """Cost before and after, in what the plan's budget is in."""
    return (plan.parameters_before, plan.parameters) if plan.cost == "params" else (plan.macs_before, plan.macs)


def smallest_step(plan: RankPlan) -> float:
    """Cost of the cheapest way to keep more: one rank in one layer, or that layer dense."""
    steps = [math.inf]
    for layer in plan.factorized.values():
        before, after = (layer.parameters_before, layer.parameters)
        if plan.cost == "macs":
            before, after = layer.macs_before, layer.macs
        steps += [after // layer.rank, before - after]
    return min(steps)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("cost", COSTS)
def test_the_budget_is_kept_filled_and_real(name: str, method: str, scheme: str, cost: str) -> None:
    model, example = (make() for make in MODELS[name])
    options = {"method": method, "scheme": scheme, "cost": cost, "example_input": example}
    least = smallest_keep(model, **options)
    for keep in (least, least + 0.25 * (1 - least), least + 0.6 * (1 - least), 0.97):
        plan = plan_ranks(model, keep, **options)
        before, after = cost_of(plan)
        assert after <= math.floor(keep * before)
        assert math.floor(keep * before) - after < smallest_step(plan), "one more rank would have fitted"
        small = smoothk.factorize(model, plan)
        assert plan.parameters_before == parameter_count(model) and plan.parameters == parameter_count(small)
        assert plan.macs_before == count_macs(model, example) and plan.macs == count_macs(small, example)
        factorized = {n: m for n, m in small.named_modules() if isinstance(m, LowRankConv2d | LowRankLinear)}
        assert {n: m.rank for n, m in factorized.items() if n in plan.factorized} == {
            n: layer.rank for n, layer in plan.factorized.items() if n in factorized
        }
        if scheme != "auto":
            schemes = {getattr(m, "scheme", "channel") for m in factorized.values() if hasattr(m, "kernel_size")}
            assert schemes <= {scheme, "channel"}


def wide() -> nn.Module:
    """About 300,000 parameters in steps of at most 1,200; without values, which makes plans fast."""
    with torch.device("meta"):
        convs = [nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 64, 3), nn.Conv2d(64, 128, 3)]
        return nn.Sequential(*convs, nn.Conv2d(128, 128, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 100))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.floats(0.35, 0.9), st.sampled_from(METHODS), st.sampled_from(SCHEMES))
def test_the_budget_is_filled_to_99_percent(keep: float, method: str, scheme: str) -> None:
    plan = plan_ranks(wide(), keep, method=method, scheme=scheme)
    assert 0.99 * keep * plan.parameters_before <= plan.parameters <= keep * plan.parameters_before


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cost", COSTS)
def test_an_unreachable_keep_names_the_smallest_that_works(name: str, cost: str) -> None:
    model, example = (make() for make in MODELS[name])
    for scheme, rank_multiple in product(SCHEMES, (1, 3)):
        options = {"scheme": scheme, "cost": cost, "rank_multiple": rank_multiple, "example_input": example}
        least = smallest_keep(model, **options)
        plan_ranks(model, least, **options)
        with pytest.raises(ValueError, match=f"keep must be at least {least}"):
            plan_ranks(model, least - 2e-6, **options)


@pytest.mark.parametrize("method", METHODS)
def test_keep_one_leaves_everything_dense(method: str) -> None:
    for make, _ in MODELS.values():
        model = make()
        plan = plan_ranks(model, 1, method=method)
        assert not plan.factorized and plan.parameters == plan.parameters_before
        small = smoothk.factorize(model, plan)
        assert repr(small) == repr(model)
        torch.testing.assert_close(small.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("rank_multiple", [2, 3, 8])
@pytest.mark.parametrize("method", METHODS)
def test_ranks_are_multiples(rank_multiple: int, method: str) -> None:
    for keep in (0.3, 0.6):
        plan = plan_ranks(wide(), keep, method=method, rank_multiple=rank_multiple)
        assert plan.factorized and all(layer.rank % rank_multiple == 0 for layer in plan.factorized.values())
        assert plan.parameters <= keep * plan.parameters_before


def test_uniform_keeps_the_same_share_of_every_layer() -> None:
    model = nn.Sequential(*(nn.Linear(30, 30) for _ in range(4)), nn.Linear(60, 60))
    with torch.no_grad():
        model[0].weight.mul_(100)  # energies do not matter
        model[1].weight.copy_(torch.ones(30, 1) @ torch.randn(1, 30) + 1e-3 * torch.randn(30, 30))
    for keep in (0.2, 0.5, 0.8):
        layers = plan_ranks(model, keep, method="uniform").factorized.values()
        shares = [layer.parameters / layer.parameters_before for layer in layers]
        steps = [share / layer.rank for share, layer in zip(shares, layers, strict=True)]
        assert len(shares) == 5
        below, above = ([share + sign * step for share, step in zip(shares, steps, strict=True)] for sign in (-1, 1))
        assert max(below) <= min(above) + 1e-9, "every layer is within one rank of a common share"


def test_energy_keeps_the_same_share_of_squares_in_every_layer() -> None:
    model = nn.Sequential(*(nn.Linear(30, 30) for _ in range(4)))
    with torch.no_grad():
        model[0].weight.mul_(100)
        model[1].weight.mul_(torch.logspace(0, -2, 30))
    spectra = [np.linalg.svd(layer.weight.detach().double().numpy(), compute_uv=False) ** 2 for layer in model]
    shares = [np.concatenate([[0], np.cumsum(s) / s.sum()]) for s in spectra]
    for keep in (0.2, 0.5, 0.8):
        plan = plan_ranks(model, keep, method="energy")
        ranks = [layer.rank or 30 for layer in plan.layers.values()]
        for share, rank, layer in zip(shares, ranks, plan.layers.values(), strict=True):
            assert layer.energy == pytest.approx(share[rank], abs=1e-6)
        # The layers cost the same, so none has a rank while another is further behind without it.
        least = min(share[rank] for share, rank in zip(shares, ranks, strict=True))
        assert all(share[rank - 1] <= least + 1e-9 for share, rank in zip(shares, ranks, strict=True))


def test_layers_stay_dense_where_their_factors_would_be_larger() -> None:
    model = nn.Sequential(nn.Linear(100, 2), nn.Linear(2, 100), nn.Linear(100, 100))
    for keep, method in product((0.4, 0.8), METHODS):
        for layer in plan_ranks(model, keep, method=method).layers.values():
            assert layer.parameters <= layer.parameters_before


def test_auto_takes_the_better_scheme_for_each_layer() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3, bias=False), nn.Conv2d(16, 16, 3, bias=False))
    left, right = torch.randn(48, 3), torch.randn(3, 48)
    with torch.no_grad():  # of rank 3 in one unfolding and of full rank in the other
        model[0].weight.copy_(torch.from_numpy(numpy_reference.fold((left @ right).numpy(), (16, 16, 3, 3), "spatial")))
        model[1].weight.copy_((torch.randn(16, 3) @ torch.randn(3, 144)).reshape(16, 16, 3, 3))
    plan = plan_ranks(model, (3 * 96 + 3 * 160) / 4608)
    assert [(layer.scheme, layer.rank) for layer in plan.layers.values()] == [("spatial", 3), ("channel", 3)]
    assert all(layer.energy == pytest.approx(1) for layer in plan.layers.values())


def least_error(model: nn.Sequential, budget: int) -> float:
    """The least sum of relative discarded energies within ``budget`` parameters: all combinations, layer by layer."""
    best = np.zeros(budget + 1)  # by parameters spent on the layers so far
    for layer in model:
        weight = layer.weight.detach().double().numpy()
        options = [(weight.size, 0.0)]
        for unfolding in ("channel", "spatial") if weight.ndim == 4 else ("channel",):
            matrix = numpy_reference.unfold(weight, unfolding)
            squares = np.linalg.svd(matrix, compute_uv=False) ** 2
            options += [(r * sum(matrix.shape), squares[r:].sum() / squares.sum()) for r in range(1, len(squares) + 1)]
        after = np.full(budget + 1, np.inf)
        for cost, error in options:
            if cost <= budget:
                after[cost:] = np.minimum(after[cost:], best[: budget + 1 - cost] + error)
        best = after
    return float(best[-1])


def test_global_is_close_to_the_best_of_all_combinations() -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, bias=False), nn.Conv2d(16, 16, 3, bias=False), *(nn.Linear(24, 24, False) for _ in range(4))
    )
    with torch.no_grad():
        for i, layer in enumerate(model[2:]):
            layer.weight.mul_(torch.logspace(0, -i, 24))
    total = parameter_count(model)
    for keep in np.linspace(0.15, 0.75, 13):  # above, whole layers go back to dense in one step
        plan = plan_ranks(model, float(keep))
        dropped = sum(1 - layer.energy for layer in plan.layers.values())
        best = least_error(model, math.floor(keep * total))
        assert best - 1e-6 <= dropped <= 1.05 * best + 0.01


# --- what is left dense -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("why", REFUSED)
def test_refused_layers_are_listed_with_the_reason_and_stay(why: str) -> None:
    make, reason, shape = REFUSED[why]
    model = nn.ModuleDict({"kept": make(), "other": nn.Linear(40, 40)}).eval()
    plan = plan_ranks(model, 0.8)
    refused = {name: layer for name, layer in plan.layers.items() if name.startswith("kept")}
    assert refused and all(layer.scheme == "dense" and reason in layer.reason for layer in refused.values())
    assert reason in str(plan)
    small = smoothk.factorize(model, plan)
    assert plan.parameters == parameter_count(small)
    x = torch.randn(shape)
    torch.testing.assert_close(small["kept"](x), model["kept"](x))
    with pytest.raises(ValueError, match=f"model has no layer to factorise.*{reason}"):
        plan_ranks(nn.ModuleDict({"kept": make()}))


@pytest.mark.filterwarnings("ignore:.*quantiz.*")
def test_quantised_layers_are_refused() -> None:
    quantized = pytest.importorskip("torch.ao.nn.quantized.dynamic")
    model = nn.ModuleDict({"kept": quantized.Linear(12, 12), "other": nn.Linear(40, 40)})
    assert plan_ranks(model, 0.5).layers["kept"].reason == "quantised"


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_layers_are_refused() -> None:
    model = nn.ModuleDict({"lazy": nn.LazyLinear(4), "other": nn.Linear(40, 40)})
    with pytest.raises(ValueError, match="lazy"):
        plan_ranks(nn.ModuleDict({"lazy": nn.LazyConv2d(4, 3)}))
    with pytest.raises(ValueError, match="lazy.weight of the model must have a shape"):  # to be counted
        plan_ranks(model, 0.5)


def test_tied_parameters_count_once_and_shared_modules_have_one_entry() -> None:
    shared = nn.Linear(20, 20)
    model = nn.ModuleDict({"a": shared, "b": shared, "tied": tied()})
    plan = plan_ranks(model, 0.6)
    assert plan.parameters_before == 420 + 144 + 24
    assert list(plan.layers) == ["a", "tied.0", "tied.1"]
    assert plan.layers["a"].rank > 0 and "tied" in plan.layers["tied.1"].reason
    assert plan.parameters == parameter_count(smoothk.factorize(model, plan))


@pytest.mark.parametrize("names", [["heads.a"], ["blocks"], ["again"], ["stem", "heads.b"], ("shared",)], ids=str)
@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_excluded_modules_stay_dense_with_all_inside(names: list[str], kind: Callable) -> None:
    model = MODELS["residual"][0]()
    inside = {id(m) for name in names for m in model.get_submodule(name).modules()}
    plan = plan_ranks(model, 0.8, exclude=kind(names))
    out = {name for name, layer in plan.layers.items() if layer.reason == "excluded"}
    assert out == {name for name in plan.layers if id(model.get_submodule(name)) in inside} and out


def test_layers_that_the_example_does_not_reach_cost_no_macs() -> None:
    model, example = (make() for make in MODELS["residual"])
    plan = plan_ranks(model, 0.5, cost="macs", example_input=example)
    assert "example_input does not reach it" in plan.layers["idle"].reason
    assert plan_ranks(model, 0.5, example_input=example).layers["idle"].reason is None


# --- models -----------------------------------------------------------------------------------------------------------


def test_nothing_about_the_model_changes() -> None:
    for make, example in MODELS.values():
        model = make().train()
        model.requires_grad_(False)
        before, x = copy.deepcopy(model.state_dict()), example()
        plan_ranks(model, 0.7, example_input=x, calibration=[x])
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        assert all(m.training for m in model.modules()) and not any(p.requires_grad for p in model.parameters())
        assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_models_on_meta_can_be_planned(name: str) -> None:
    model = MODELS[name][0]()
    on_meta = copy.deepcopy(model).to("meta")
    for method, scheme in product(METHODS, SCHEMES):
        least = smallest_keep(model, scheme=scheme)
        keep = least + 0.4 * (1 - least)
        plan = plan_ranks(on_meta, keep, method=method, scheme=scheme)
        assert plan.factorized and plan.parameters <= keep * plan.parameters_before
        assert plan.parameters == parameter_count(smoothk.factorize(model, plan)), "a plan fits the real model"
        with pytest.raises(ValueError, match="meta"):
            smoothk.factorize(on_meta, plan)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_can_be_planned(dtype: torch.dtype) -> None:
    model = perceptron().to(dtype)
    plan = plan_ranks(model, 0.5)
    assert plan.parameters == parameter_count(smoothk.factorize(model, plan)) <= 0.5 * plan.parameters_before


@pytest.mark.parametrize("method", METHODS)
def test_zero_weights_need_rank_one_only(method: str) -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    nn.init.zeros_(model[1].weight)
    plan = plan_ranks(model, 0.7, method=method)
    small = smoothk.factorize(model, plan)
    assert not small[1].weight.any() and plan.parameters <= 0.7 * plan.parameters_before
    if method != "uniform":
        assert plan.layers["1"].rank == 1 and plan.layers["1"].energy == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_layer_that_is_not_finite_is_named(bad: float) -> None:
    model = perceptron()
    plan = plan_ranks(model, 0.5)
    model[2].weight.data[3, 4] = bad
    for call in (
        lambda: plan_ranks(model, 0.5),
        lambda: smoothk.factorize(model, plan),
        lambda: smoothk.compress(model, 0.5),
    ):
        with pytest.raises(ValueError, match="layer '2'.* finite, got NaN or Inf"):
            call()


@pytest.mark.parametrize("name", ["1.weight", "1.running_mean", "1.running_var", "3.bias"])
def test_a_diverged_model_is_refused(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    plan_ranks(model, 0.9)
    dict([*model.named_parameters(), *model.named_buffers()])[name].data[1] = math.nan
    with pytest.raises(ValueError, match=f"{name} of the model must be finite, got NaN or Inf"):
        plan_ranks(model, 0.9)


def test_a_mask_may_hold_infinities() -> None:
    model = perceptron()
    model.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))
    assert plan_ranks(model, 0.5).factorized


@pytest.mark.parametrize("wrap", [tuple, lambda pair: dict(zip(("x", "y"), pair, strict=True))])
def test_batches_are_tensors_tuples_or_dictionaries(wrap: Callable) -> None:
    class TwoArguments(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(20, 20), nn.Linear(20, 20)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, list[Tensor]]:
            return {"out": [self.a(x), self.b(y)]}

    batch = wrap((torch.randn(4, 20), torch.randn(4, 20)))
    plan = plan_ranks(TwoArguments(), 0.6, cost="macs", example_input=batch, calibration=[batch])
    assert plan.macs <= 0.6 * plan.macs_before


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_message_names_what_takes_the_budget() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.rnn, self.head = nn.Embedding(50, 16), nn.LSTM(16, 64), nn.Linear(64, 50)

    begin = r"keep must be at least 0\.\d+ for this model, got 0\.5; not factorised are "
    with pytest.raises(
        ValueError, match=begin + r"20,992 parameters of 'rnn' \(LSTM\), 800 .* 'embedding' \(Embedding\)$"
    ):
        plan_ranks(Recurrent(), 0.5)
    with pytest.raises(ValueError, match="keep must be at least 1 for this model, got 0.5; with rank_multiple=32$"):
        plan_ranks(nn.Linear(32, 32, bias=False), 0.5, rank_multiple=32)
    head = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50, bias=False))
    head[1].weight = head[0].weight
    with pytest.raises(ValueError, match=r"not factorised are 800 parameters of '0' \(Embedding\)$"):
        plan_ranks(nn.Sequential(head[0], nn.Linear(16, 16, bias=False), head[1]), 0.5)
    again = smoothk.factorize(perceptron(), plan_ranks(perceptron(), 0.5))
    with pytest.raises(ValueError, match="low-rank already.*; smoothk.decompress makes low-rank layers dense again"):
        plan_ranks(again, 0.5)


def test_numbers_of_numpy_are_numbers() -> None:
    plan = plan_ranks(perceptron(), np.float32(0.6))
    assert RankPlan.from_json(plan.to_json()).keep == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep": 0.0}, ValueError, r"keep must be in \(0, 1\], got 0.0"),
        ({"keep": -0.5}, ValueError, r"keep must be in \(0, 1\], got -0.5"),
        ({"keep": 1.5}, ValueError, r"keep must be in \(0, 1\], got 1.5"),
        ({"keep": math.nan}, ValueError, r"keep must be in \(0, 1\], got nan"),
        ({"keep": "0.5"}, TypeError, "keep must be a number, got str"),
        ({"keep": True}, TypeError, "keep must be a number, got bool"),
        ({"method": "best"}, ValueError, "method must be one of 'uniform', 'energy', 'global', got 'best'"),
        ({"scheme": "row"}, ValueError, "scheme must be one of 'channel', 'spatial', 'auto', got 'row'"),
        ({"cost": "bytes"}, ValueError, "cost must be one of 'params', 'macs', 'latency', got 'bytes'"),
        ({"cost": "macs"}, ValueError, "example_input must be given for cost='macs'"),
        ({"rank_multiple": 0}, ValueError, "rank_multiple must be .*positive.* got 0"),
        ({"rank_multiple": 1.5}, TypeError, "rank_multiple must be an int, got float"),
        ({"exclude": ["0", "9"]}, ValueError, "exclude must name modules of the model, got '9'"),
        ({"exclude": "0"}, TypeError, "exclude must be a sequence of module names, got .*'0'"),
        ({"exclude": [0]}, TypeError, "exclude must be a sequence of module names"),
        ({"exclude": ["0", "2", "4"]}, ValueError, "model has no layer to factorise.*excluded"),
        ({"model": nn.Sequential(nn.ReLU())}, ValueError, "model has no layer to factorise"),
        ({"model": nn.BatchNorm2d(3)}, ValueError, "model has no layer to factorise"),
        ({"model": "resnet18"}, TypeError, "model must be a torch.nn.Module, got str"),
        ({"calibration": 3}, TypeError, "calibration must be re-iterable .*, got int"),
    ],
)  # fmt: skip
def test_bad_arguments(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan_ranks(**{"model": perceptron(), "keep": 0.5, **options})


def test_a_planner_makes_the_plans_of_plan_ranks_from_one_look_at_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, example = (make() for make in MODELS["residual"])
    looks = []
    squares = ranks.squared_singular_values
    monkeypatch.setattr(ranks, "squared_singular_values", lambda *args: looks.append(args) or squares(*args))
    for options in ({}, {"method": "uniform", "rank_multiple": 2}, {"cost": "macs", "exclude": ["heads.a"]}):
        options = {**options, "example_input": example}
        expected = {keep: plan_ranks(model, keep, **options) for keep in (0.5, 0.9, 0.7)}
        once = len(looks) // len(expected)
        looks.clear()
        planner = RankPlanner(model, **options)
        assert set(planner.plan(0.5).factorized) <= set(planner.layers) <= set(planner.plan(1.0).layers)
        before = copy.deepcopy(model.state_dict())
        for parameter in model.parameters():  # the planner has seen them as they were
            nn.init.normal_(parameter)
        assert {keep: planner.plan(keep) for keep in (0.9, 0.5, 0.7)} == expected
        assert len(looks) == once
        looks.clear()
        model.load_state_dict(before)
        with pytest.raises(ValueError, match="keep must be at least 0"):
            planner.plan(1e-9)
        with pytest.raises(TypeError, match="keep must be a number, got str"):
            planner.plan("0.5")


def test_a_planner_asks_calibration_inputs_and_the_clock_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, asked = perceptron(), [torch.randn(8, 20)], []
    for name in ("direction_importance", "measure_layers", "measure_model"):
        original = getattr(ranks, name)
        monkeypatch.setattr(ranks, name, lambda *args, n=name, f=original: asked.append(n) or f(*args))
    calibrated = RankPlanner(model, calibration=batches)
    plans = {keep: calibrated.plan(keep) for keep in (0.8, 0.6)}
    assert asked == ["direction_importance"]
    assert plans == {keep: plan_ranks(model, keep, calibration=batches) for keep in plans}
    asked.clear()
    timed = RankPlanner(model, cost="latency", example_input=batches[0])
    assert [timed.plan(keep).keep for keep in (1.0, 1.0)] == [1.0, 1.0]
    assert asked == ["measure_layers", "measure_model"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "vit_b16"])
def test_large_models_are_planned_in_time_and_space(name: str) -> None:
    """Data-free on two cores: ResNet-50 in 60 s, ViT-B/16 in 180 s, in 2 GiB beyond the model."""
    code = f"""
import resource, time, torch
from torch import nn
from benchmarks import weight_sets
import smoothk
torch.set_num_threads(2)
shapes = weight_sets._{name}()
model = nn.ModuleList(nn.Linear(s[1], s[0]) if len(s) == 2 else nn.Conv2d(s[1], s[0], s[2:]) for s in shapes)
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
plan = smoothk.plan_ranks(model, 0.3)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, plan.parameters_before)
"""
    root = Path(__file__).resolve().parent.parent
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr
    seconds, kilobytes, parameters = map(float, out.stdout.split())
    assert parameters > 25e6
    assert seconds <= {"resnet50": 60, "vit_b16": 180}[name] and kilobytes <= 2**21
