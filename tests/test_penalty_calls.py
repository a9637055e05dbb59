"""`smoothk.SmoothnessPenalty` from call to call: what it keeps, and what it sees of a model that has changed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import assert_close_rel
from test_penalties import ALL_TERMS, expected, expected_terms, small_model, weights_of
from torch import Tensor, nn

from smoothk import SmoothnessPenalty


def test_it_follows_a_model_that_is_moved() -> None:
    model = small_model(torch.float32)
    penalty = SmoothnessPenalty(model)
    model.double()
    value, gradients = expected(weights_of(model), {})
    assert penalty().dtype == torch.float64
    assert_close_rel(penalty(), value, torch.float64)
    penalty.accumulate_grad()
    assert_close_rel(model[0].weight.grad, gradients[0], torch.float64)
    model.to(memory_format=torch.channels_last)
    assert_close_rel(penalty(), value, torch.float64)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("way", ["forward", "accumulate_grad"])
def test_polar_factors_serve_every_call_until_they_are_due(way: str, normalized: bool) -> None:
    """A stale factor X gives <W, X>, below ‖W‖_*, with gradient X."""
    model = small_model()
    options = {"first_order": 0, "nuclear": 2.0, "normalized": normalized}
    penalty = SmoothnessPenalty(model, **options, every=3)
    stale: list[Tensor] = []
    for step in range(7):
        with torch.no_grad():
            for weight in weights_of(model):
                weight.add_(torch.randn_like(weight), alpha=0.1)
        model.zero_grad()
        value = getattr(penalty, way)()
        if way == "forward":
            value.backward()
        wanted, gradients = expected(weights_of(model), options)
        if step % 3 == 0:
            stale = [torch.from_numpy(expected_terms(weight, {})["nuclear"][1]) for weight in weights_of(model)]
        else:
            assert value < wanted
            leaves = [weight.detach().clone().requires_grad_() for weight in weights_of(model)]
            alongs = [
                (leaf * x).sum() / (leaf.norm() if normalized else 1) for leaf, x in zip(leaves, stale, strict=True)
            ]
            wanted = 2 * sum(alongs)
            gradients = [gradient.numpy() for gradient in torch.autograd.grad(wanted, leaves)]
        assert_close_rel(value, wanted, torch.float64)
        for weight, gradient in zip(weights_of(model), gradients, strict=True):
            np.testing.assert_allclose(weight.grad.numpy(), gradient, rtol=1e-9, atol=1e-10)
        exact = sum(layer["nuclear"] for layer in penalty.per_layer().values())
        assert_close_rel(2 * exact, expected(weights_of(model), options)[0], torch.float64)


def test_polar_factors_are_not_kept_for_other_weights() -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).double()
    options = {"first_order": 0, "nuclear": 1.0}
    penalty = SmoothnessPenalty(model, **options, every=100)
    model[0].weight.requires_grad_(False)
    penalty()
    model[0].weight.requires_grad_(True)
    model[1].weight.requires_grad_(False)
    assert_close_rel(penalty(), expected([model[0].weight], options)[0], torch.float64)


def test_polar_factors_are_not_kept_in_another_precision() -> None:
    model = nn.Linear(6, 4)
    penalty = SmoothnessPenalty(model, first_order=0, nuclear=1.0, every=100)
    penalty()
    model.double()
    assert_close_rel(penalty(), expected([model.weight], {"first_order": 0, "nuclear": 1.0})[0], torch.float64)


def test_parameters_that_are_replaced_are_followed() -> None:
    model = small_model().to("meta")
    penalty = SmoothnessPenalty(model, **ALL_TERMS)
    model.load_state_dict(small_model().state_dict(), assign=True)
    value, gradients = expected(weights_of(model), ALL_TERMS)
    assert_close_rel(penalty(), value, torch.float64)
    assert_close_rel(penalty.accumulate_grad(), value, torch.float64)
    for weight, wanted in zip(weights_of(model), gradients, strict=True):
        assert_close_rel(weight.grad, wanted, torch.float64)
    del model[4].weight
    with pytest.raises(RuntimeError, match="weight 4.weight must still be a parameter of its Linear"):
        penalty()


def _exchange(model: nn.Module) -> None:
    model[4].weight = nn.Parameter(torch.randn(4, 8, dtype=torch.float64))


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "frozen": lambda model: model[2].weight.requires_grad_(False),
    "without gradients": lambda model: model.zero_grad(set_to_none=True),
    "another dtype": lambda model: model.double(),
    "one of another dtype": lambda model: model[4].double(),
    "another parameter": _exchange,
    "shorter": lambda model: setattr(model[4].weight, "data", torch.randn(1, 8)) or model[4].zero_grad(),
    "gradient of another layout": lambda model: setattr(model[4].weight, "grad", torch.zeros(8, 4).t()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
@pytest.mark.parametrize("options", [ALL_TERMS, {"backend": "torch"}], ids=["all terms", "torch"])
def test_a_call_sees_what_has_changed_since_the_last(change: Callable[[nn.Module], object], options: dict) -> None:
    model = small_model(torch.float32)
    penalty = SmoothnessPenalty(model, **options)
    for _ in range(3):
        penalty.accumulate_grad()
    change(model)
    other = copy.deepcopy(model)
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        its.grad = None if mine.grad is None else mine.grad.clone()
    value, expected = penalty.accumulate_grad(), SmoothnessPenalty(other, **options).accumulate_grad()
    assert value.dtype == expected.dtype
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    for one, two in zip(weights_of(model), weights_of(other), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=0, atol=0)


def test_a_call_sees_gradients_that_have_become_unusable() -> None:
    model = small_model(torch.float32)
    penalty = SmoothnessPenalty(model)
    penalty.accumulate_grad()
    usable = model[4].weight.grad
    for grad, error in ((torch.eye(4, 8).to_sparse(), TypeError), (torch.ones(1, 8).expand(4, 8), ValueError)):
        model[4].weight.grad = grad
        before = model[0].weight.grad.clone()
        for _ in range(2):
            with pytest.raises(error, match=r"\.grad of 4\.weight"):
                penalty.accumulate_grad()
        torch.testing.assert_close(model[0].weight.grad, before, rtol=0, atol=0)
        model[4].weight.grad = usable
        penalty.accumulate_grad()


def test_a_penalty_that_was_used_can_be_copied_and_pickled() -> None:
    model = small_model(torch.float32)
    penalty = SmoothnessPenalty(model)
    penalty.accumulate_grad()
    for other in (copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty))):
        torch.testing.assert_close(other.accumulate_grad(), penalty.accumulate_grad(), rtol=0, atol=0)
