"""`smoothk.search`: ranks moved between layers by what the compressed model's outputs say."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from small_models import MODELS, parameter_count
from torch import Tensor, nn

import smoothk
from smoothk import plan_ranks, search


class Weighted(nn.Module):
    """Two equal layers, one of which hardly counts in the output: weights alone cannot tell them apart."""

    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(24, 24, bias=False), nn.Linear(24, 24, bias=False)
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) + 1e-3 * self.b(x))[:, : self.outputs].unsqueeze(2)


def output_error(model: nn.Module, small: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        return sum(float((small(x) - model(x)).square().sum()) for x in batches)


@pytest.mark.parametrize("cost", ["params", "macs"])
def test_cost_goes_to_the_layer_that_counts(cost: str) -> None:
    model, batches = Weighted(), [torch.randn(50, 24) for _ in range(2)]
    options = {"cost": cost, "example_input": batches[0]}
    free = plan_ranks(model, 0.5, **options)
    searched = plan_ranks(model, 0.5, calibration=batches, search=True, **options)
    assert searched.layers["a"].rank > free.layers["a"].rank and searched.layers["b"].rank < free.layers["b"].rank
    assert searched.parameters <= 0.5 * searched.parameters_before
    errors = [output_error(model, smoothk.factorize(model, plan), batches) for plan in (free, searched)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_budget_is_kept_and_the_plan_real(name: str) -> None:
    model, _ = (make() for make in MODELS[name])
    batches = [MODELS[name][1]() for _ in range(3)]
    keep = 0.85 if name == "plain" else 0.6
    plan = plan_ranks(model, keep, calibration=batches, search=True)
    assert plan.parameters == parameter_count(smoothk.factorize(model, plan))
    assert plan.parameters <= math.floor(keep * plan.parameters_before)
    assert plan_ranks(model, keep, calibration=batches, search=True) == plan, "the same inputs give the same plan"


def test_a_trial_sets_the_weights_that_factorize_gives() -> None:
    model = MODELS["plain"][0]().double().eval()
    batches = [torch.randn(5, 3, 9, 8, dtype=torch.float64) for _ in range(3)]
    plan = plan_ranks(model, 0.85, calibration=batches)
    recorded = {}

    def spy(model: nn.Module, layers: dict, choices: dict, picked: dict, budget: int, batches: list) -> dict:
        trial = search._Trial(model, layers, choices, batches)
        trial.distance({name: len(options) - 1 for name, options in choices.items()})  # and back again
        recorded["planned"] = trial.distance(picked)
        return dict(picked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smoothk.ranks.refine", spy)
        assert plan_ranks(model, 0.85, calibration=batches, search=True) == plan
    small = smoothk.factorize(model, plan)
    for norm in (m for m in small.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.train()
    with torch.no_grad():
        pairs = [(model(x).log_softmax(1), copy.deepcopy(small)(x).log_softmax(1)) for x in batches]
    expected = sum(float((old.exp() * (old - new)).sum()) for old, new in pairs)
    assert recorded["planned"] == pytest.approx(expected, rel=1e-3)


def test_only_as_many_inputs_as_needed_are_read() -> None:
    read = []

    class Batches:
        def __iter__(self):
            for i in range(100):
                read.append(i)
                yield torch.randn(200, 24)

    plan_ranks(Weighted(), 0.5, calibration=Batches(), search=True)
    assert max(read) == 2  # 600 inputs, and the first batch of all was looked at


def test_a_model_without_float_outputs_is_refused() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(20, 20)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).argmax(1)

    with pytest.raises(ValueError, match="calibration needs a model with floating-point outputs"):
        plan_ranks(Counts(), 0.5, calibration=[torch.randn(3, 20)], search=True)


def test_a_search_needs_inputs_and_the_global_method() -> None:
    for options in ({}, {"calibration": [torch.randn(3, 24)], "method": "energy"}):
        with pytest.raises(ValueError, match="search needs calibration and method='global'"):
            plan_ranks(Weighted(), 0.5, search=True, **options)


def test_a_model_on_meta_is_refused() -> None:
    with pytest.raises(ValueError, match="model must hold values for calibration"):
        plan_ranks(Weighted().to("meta"), 0.5, calibration=[torch.randn(3, 24, device="meta")], search=True)
