"""`smoothk.RankPlan`: how it prints, JSON, and what fits no layer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
from small_models import MODELS, perceptron
from torch import nn

import smoothk
from smoothk import LowRankLinear, RankPlan, plan_ranks
from smoothk.rank_plan import LayerPlan


def test_a_plan_prints_one_row_per_layer() -> None:
    model, example = (make() for make in MODELS["residual"])
    plan = plan_ranks(model, 0.5, example_input=example, exclude=["heads.a"])
    text = str(plan)
    for name, layer in plan.layers.items():
        (line,) = (line for line in text.splitlines() if line.split()[:1] == [name])
        assert "x".join(map(str, layer.shape)) in line and layer.scheme in line
    assert f"{plan.parameters:,} of {plan.parameters_before:,} parameters" in text and "MACs" in text


@pytest.mark.parametrize("name", MODELS)
def test_json_goes_both_ways(name: str) -> None:
    model, example = (make() for make in MODELS[name])
    for options in ({}, {"example_input": example}, {"cost": "macs", "example_input": example, "method": "energy"}):
        plan = plan_ranks(model, 0.8, **options)
        again = RankPlan.from_json(plan.to_json())
        assert again == plan and str(again) == str(plan) and again.to_json() == plan.to_json()
        json.loads(plan.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


JSON = plan_ranks(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(9, 9)).to("meta"), 0.7).to_json()


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{}", "3", '"plan"', "nan", "{", '{"layers": 3}', '{"layers": {"a": {}}}', "[" * 100_000, "\0",
     "{" + JSON[1:-1] + ', "surprise": 1}'],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_garbage_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="text must be the JSON of a RankPlan"):
        RankPlan.from_json(text)


@pytest.mark.parametrize("text", [None, 3, {}, b"{}"])
def test_what_is_not_text_is_a_type_error(text: object) -> None:
    with pytest.raises(TypeError, match=f"text must be a str, got {type(text).__name__}"):
        RankPlan.from_json(text)


def test_every_truncation_is_a_value_error() -> None:
    for end in range(len(JSON)):
        with pytest.raises(ValueError, match="text must be"):
            RankPlan.from_json(JSON[:end])


def leaves(value: object, path: tuple = ()) -> Iterator[tuple]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from leaves(item, (*path, key))


@pytest.mark.parametrize("junk", [None, True, -1, 0, 1.5, 10**30, "x", [], {}, [[1]], {"a": 1}, math.nan], ids=repr)
def test_every_field_is_checked(junk: object) -> None:
    """Whatever is put in the place of any value: a ValueError, or a plan that prints and can be applied or refused."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(9, 9))
    for path in list(leaves(json.loads(JSON)))[1:]:
        data = json.loads(JSON)
        target = data
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = junk
        try:
            plan = RankPlan.from_json(json.dumps(data))
        except ValueError:
            continue
        str(plan), plan.to_json(), plan.table()
        try:
            smoothk.factorize(model, plan)
        except ValueError as error:
            assert "plan must fit the model" in str(error), (path, junk)


def test_plans_can_be_written_by_hand() -> None:
    model = perceptron()
    plan = plan_ranks(model, 0.5)
    layer = replace(plan.layers["2"], rank=3, scheme="channel")
    small = smoothk.factorize(model, replace(plan, layers={"2": layer}))
    assert isinstance(small[2], LowRankLinear) and small[2].rank == 3 and isinstance(small[0], nn.Linear)


@pytest.mark.parametrize(
    ("shape", "groups", "scheme", "full"),
    [((6, 4), 1, "channel", 4), ((8, 3, 3, 1), 2, "channel", 4), ((4, 2, 3, 5), 1, "spatial", 6)],
)
def test_a_plan_takes_the_full_rank_and_not_one_more(
    shape: tuple[int, ...], groups: int, scheme: str, full: int
) -> None:
    layer = LayerPlan(shape, groups, scheme, full, math.prod(shape), 1)
    layer.check("layer")
    with pytest.raises(ValueError, match=rf"layer 'layer' of shape .* cannot have rank {full + 1}"):
        replace(layer, rank=full + 1).check("layer")
