"""`smoothk.SmoothnessPenalty` from call to call: what it keeps, and what it sees of a model that has changed."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import assert_close_rel
from test_penalties import ALL_TERMS, expected, expected_terms, small_model, weights_of
from torch import Tensor, nn

from smoothk import BackendUnavailable, SmoothnessPenalty, penalties


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


def _resize(rows: int) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model[4].weight.data = torch.randn(rows, 8)
        model[4].weight.grad = None

    return change


def _to_half_with_gradients_in(dtype: torch.dtype) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for weight in weights_of(model):
            weight.data, weight.grad = weight.data.bfloat16(), None
            weight.grad_dtype = dtype
            weight.grad = torch.zeros_like(weight, dtype=dtype)

    return change


def _drop_gradients(model: nn.Module) -> None:
    model.zero_grad(set_to_none=True)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "nothing": lambda model: None,
    "frozen": lambda model: model[2].weight.requires_grad_(False),
    "thawed": lambda model: model[0].weight.requires_grad_(True),
    "without gradients": _drop_gradients,
    "another dtype": lambda model: model.double(),
    "one of another dtype": lambda model: model[4].double(),
    "the frozen one of another dtype": lambda model: model[0].double(),
    "another parameter": _exchange,
    "shorter": _resize(1),
    "longer": _resize(9),
    "half precision": _to_half_with_gradients_in(torch.bfloat16),
    "half precision, gradients in single": _to_half_with_gradients_in(torch.float32),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
@pytest.mark.parametrize("options", [{}, ALL_TERMS, {"backend": "torch"}], ids=["one kernel", "all terms", "torch"])
@pytest.mark.parametrize("drop", [_drop_gradients, lambda model: None], ids=["without gradients", "with gradients"])
def test_a_call_sees_what_has_changed_since_the_last(
    change: Callable[[nn.Module], object], options: dict, drop: Callable[[nn.Module], None]
) -> None:
    model = small_model(torch.float32)
    model[0].weight.requires_grad_(False)
    penalty = SmoothnessPenalty(model, **options)
    for _ in range(2):
        drop(model)
        penalty.accumulate_grad()
    drop(model)
    change(model)
    other = copy.deepcopy(model)
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        its.grad_dtype = mine.grad_dtype
        its.grad = None if mine.grad is None else mine.grad.clone()
    value, expected = penalty.accumulate_grad(), SmoothnessPenalty(other, **options).accumulate_grad()
    assert value.dtype == expected.dtype
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    for one, two in zip(weights_of(model), weights_of(other), strict=True):
        assert (one.grad is None) == (two.grad is None)
        torch.testing.assert_close(one.grad, two.grad, rtol=0, atol=0)


def test_a_call_sees_weights_that_have_moved() -> None:
    model = small_model(torch.float32)
    penalty = SmoothnessPenalty(model)
    model.zero_grad()
    penalty.accumulate_grad()
    model.zero_grad()
    assert penalty.accumulate_grad().device.type == "cpu"
    model.to("meta").zero_grad()
    assert penalty.accumulate_grad().device.type == "meta"


def test_a_call_sees_what_has_been_set_since_the_last() -> None:
    model = small_model(torch.float32)
    penalty, options = SmoothnessPenalty(model, first_order=0.5), {}
    penalty.accumulate_grad()  # there are gradients from here on
    for change in ({"dim": (1,)}, {"norm": "l1"}, {"normalized": True}):
        penalty.accumulate_grad()
        for name, value in change.items():
            setattr(penalty, name, value)
        options |= change
        value = penalty.accumulate_grad()
        torch.testing.assert_close(value, SmoothnessPenalty(model, first_order=0.5, **options).accumulate_grad())
    both = SmoothnessPenalty(model, first_order=0.5, nuclear=0.1)
    both.accumulate_grad()
    both.coefficients["nuclear"] = 0.0
    torch.testing.assert_close(both.accumulate_grad(), SmoothnessPenalty(model, first_order=0.5).accumulate_grad())
    penalty.backend = "cuda"
    with pytest.raises(BackendUnavailable, match="cuda"):
        penalty.accumulate_grad()


def test_a_call_sees_one_gradient_in_another_precision() -> None:
    model = small_model(torch.bfloat16)
    penalty = SmoothnessPenalty(model)
    for _ in range(2):
        penalty.accumulate_grad()
    model[4].weight.grad = None
    model[4].weight.grad_dtype = torch.float32
    model[4].weight.grad = torch.zeros(4, 8)
    penalty.accumulate_grad()
    weight = model[4].weight.detach().float().requires_grad_()
    SmoothnessPenalty([weight]).accumulate_grad()
    torch.testing.assert_close(model[4].weight.grad, weight.grad)


def test_calls_with_the_same_tensors_choose_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, chosen = small_model(torch.float32), []
    choose = penalties.choose_backends
    monkeypatch.setattr(penalties, "choose_backends", lambda op, *args: chosen.append(op) or choose(op, *args))
    penalty = SmoothnessPenalty(model)
    for _ in range(4):
        penalty.accumulate_grad()
    assert chosen == ["difference_penalty"]
    for _ in range(2):  # tensors of a subclass are looked at in every call
        model[4].weight = nn.Parameter(_Named(torch.randn(4, 8)))
        model[4].weight.grad = torch.zeros(4, 8)
        penalty.accumulate_grad()
    assert len(chosen) == 3
    model[4].weight, named = nn.Parameter(torch.randn(4, 8)), model[4].weight
    for weight in (model[4].weight, named):
        weight.grad = torch.zeros(4, 8)
    for _ in range(2):
        penalty.accumulate_grad()
    torch.utils.swap_tensors(model[4].weight, named)  # the same object is of the subclass now
    penalty.accumulate_grad()
    assert len(chosen) == 5


def test_a_call_sees_weights_that_have_other_axes() -> None:
    model = small_model(torch.float32)
    penalty = SmoothnessPenalty(model)
    penalty.accumulate_grad()
    model[4].weight.data, model[4].weight.grad = torch.randn(32), None
    model[4].weight.grad = torch.zeros(32)
    with pytest.raises(RuntimeError, match="weight 4.weight must keep its 2 axes"):
        penalty.accumulate_grad()


def test_a_call_sees_a_weight_whose_contents_were_swapped() -> None:
    """``torch.utils.swap_tensors``: the same object has another device or class."""
    model = small_model(torch.float32)
    penalty = SmoothnessPenalty(model)
    for _ in range(2):
        penalty.accumulate_grad()
    others = [weight for weight in weights_of(model) if weight is not model[2].weight]
    before = [weight.grad.clone() for weight in others]
    other = nn.Parameter(torch.empty_like(model[2].weight, device="meta"))
    other.grad = torch.zeros_like(other)
    torch.utils.swap_tensors(model[2].weight, other)
    with pytest.raises(ValueError, match="weight 2.weight must hold values as others do"):
        penalty.accumulate_grad()
    for weight, was in zip(others, before, strict=True):
        torch.testing.assert_close(weight.grad, was, rtol=0, atol=0)


class _Named(torch.Tensor):
    """A tensor with more to it."""


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
    value = penalty.accumulate_grad()
    torch.testing.assert_close(copy.deepcopy(penalty).accumulate_grad(), value, rtol=0, atol=0)
    code = (
        "import pickle, sys, torch; penalty, weights = pickle.load(sys.stdin.buffer)\n"
        "for weight in weights: weight.grad = torch.zeros_like(weight)\n"  # which are not pickled
        "print(penalty.accumulate_grad().item())"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps((penalty, weights_of(model))), env=env, capture_output=True
    )
    assert out.returncode == 0, out.stderr.decode()
    assert float(out.stdout) == value.item()
