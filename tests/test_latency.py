"""``plan_ranks(cost="latency")``: plans from measured times, by a clock that counts MACs and by the real one."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from small_models import MODELS, perceptron
from torch import nn

from smoothk import RankPlan, latency, plan_ranks
from smoothk.macs import count_macs


@pytest.fixture
def macs_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass takes 10 ns per MAC: linear in the rank, so that interpolation between ranks is exact."""

    def nanoseconds(module: nn.Module, inputs: latency.Inputs) -> int:
        return 10 * sum(times * count_macs(module, batch) for batch, times in inputs)

    monkeypatch.setattr(latency, "_nanoseconds", nanoseconds)
    monkeypatch.setattr(latency, "_MOST_SAMPLES", 1)


@pytest.mark.parametrize("scheme", ["channel", "spatial", "auto"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "transformer"])
def test_with_a_clock_that_counts_macs_it_is_the_plan_for_macs(macs_clock: None, name: str, scheme: str) -> None:
    model, example = (make() for make in MODELS[name])
    keep, options = 0.85, {"scheme": scheme, "example_input": example}
    plan, expected = (plan_ranks(model, keep, cost=cost, **options) for cost in ("latency", "macs"))
    assert plan.latency_before == pytest.approx(1e-8 * expected.macs_before)
    assert plan.latency == pytest.approx(1e-8 * plan.macs) and plan.latency <= keep * plan.latency_before
    # The ranks of a plan for MACs can cost more parameters than the weight.
    if all(layer.parameters <= layer.parameters_before for layer in expected.layers.values()):
        assert plan.layers == expected.layers


def test_the_unmeasured_rest_counts_as_unchanged(macs_clock: None) -> None:
    model, example = (make() for make in MODELS["perceptron"])
    plan = plan_ranks(model, 0.8, cost="latency", example_input=example, exclude=["2"])
    assert plan.layers["2"].scheme == "dense" and plan.latency <= 0.8 * plan.latency_before
    with pytest.raises(ValueError, match=r"keep must be at least 0\.\d+ for this model, got 0.4"):
        plan_ranks(model, 0.4, cost="latency", example_input=example, exclude=["2"])


def test_times_between_the_measured_ranks_lie_on_a_line() -> None:
    times = latency.LayerTimes(900, {"channel": [1, 5, 9]}, {"channel": [100, 300, 300]})
    assert [times.at("channel", rank) for rank in (1, 2, 4, 5, 7, 9, 20)] == [100, 150, 250, 300, 300, 300, 300]
    assert latency.LayerTimes(9, {"channel": [1]}, {"channel": [5]}).at("channel", 3) == 5


@pytest.mark.parametrize("rank_multiple", [1, 4])
def test_the_real_clock_gives_plans_within_the_budget(monkeypatch: pytest.MonkeyPatch, rank_multiple: int) -> None:
    monkeypatch.setattr(latency, "_MOST_SAMPLES", 5)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024)).train()
    before, x, state = copy.deepcopy(model.state_dict()), torch.randn(128, 1024), torch.get_rng_state()
    plan = plan_ranks(model, 0.8, cost="latency", example_input=x, rank_multiple=rank_multiple)
    assert 0 < plan.latency <= 0.8 * plan.latency_before and plan.factorized
    assert all(layer.rank % rank_multiple == 0 for layer in plan.factorized.values())
    assert " ms" in str(plan) and RankPlan.from_json(plan.to_json()) == plan
    assert torch.equal(torch.get_rng_state(), state) and all(m.training for m in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_what_cannot_be_timed_is_refused() -> None:
    with pytest.raises(ValueError, match="example_input must be given for cost='latency', got None"):
        plan_ranks(perceptron(), 0.5, cost="latency")
    with pytest.raises(ValueError, match="model must hold values for cost='latency', got .* on the meta device"):
        plan_ranks(perceptron().to("meta"), 0.5, cost="latency", example_input=torch.randn(2, 20, device="meta"))


@pytest.mark.parametrize("junk", [{"latency": 1.0}, {"latency": -1.0, "latency_before": 2.0}, {"latency_before": "1"}])
def test_latencies_in_a_file_are_checked(junk: dict) -> None:
    plan = replace(plan_ranks(perceptron(), 0.5), **junk)
    with pytest.raises(ValueError, match="latencies must be positive numbers"):
        RankPlan.from_json(plan.to_json())
