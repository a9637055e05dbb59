"""`smoothk.SmoothnessPenalty` where it raises: what the message names, and that nothing has been changed."""

from __future__ import annotations

import pytest
import torch
from test_penalties import ALL_TERMS, small_model
from torch import Tensor, nn

import smoothk
from smoothk import SmoothnessPenalty


def grads_of(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("backend", ["triton", "cuda", "metal", "cpp"])
def test_a_call_that_fails_leaves_the_gradients(backend: str) -> None:
    """No gradient is created or added to, although the difference terms alone would run in C++."""
    model = small_model(torch.float32)
    model[4].weight.grad = torch.randn(4, 8)
    before = grads_of(model)
    with pytest.raises((smoothk.BackendUnavailable, ValueError), match=f"backend.*{backend}"):
        SmoothnessPenalty(model, **ALL_TERMS, backend=backend).accumulate_grad()
    torch.testing.assert_close(grads_of(model), before, rtol=0, atol=0)


def test_a_weight_that_was_flattened_is_named_and_nothing_changes() -> None:
    """FullyShardedDataParallel does it, and the differences between entries of a flat shard mean nothing."""
    model = small_model(torch.float32)
    penalty = SmoothnessPenalty(model)
    model[4].weight = nn.Parameter(model[4].weight.detach().flatten())
    for call in (penalty, penalty.accumulate_grad, penalty.per_layer):
        with pytest.raises(RuntimeError, match=r"weight 4.weight must keep its 2 axes, got shape \(32,\)"):
            call()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_gradient_that_is_not_dense_is_named_and_nothing_changes() -> None:
    model = small_model(torch.float32)
    model[4].weight.grad = torch.eye(4, 8).to_sparse()
    before = grads_of(model)
    with pytest.raises(TypeError, match=r"\.grad of 4\.weight must be a dense"):
        SmoothnessPenalty(model, **ALL_TERMS).accumulate_grad()
    assert [g is None for g in grads_of(model)] == [g is None for g in before]


@pytest.mark.parametrize("terms", [{"first_order": 0.5}, {"first_order": 0.0, "nuclear": 0.5}], ids=str)
@pytest.mark.parametrize("backend", ["torch", None])
def test_a_gradient_that_is_expanded_is_named_and_nothing_changes(terms: dict, backend: str | None) -> None:
    model = small_model(torch.float32)
    model[4].double()  # computed apart from the others
    model[4].weight.grad = torch.ones(1, 8, dtype=torch.float64).expand(4, 8)
    before = grads_of(model)
    with pytest.raises(ValueError, match=r"\.grad of 4\.weight must not be an expanded tensor, got strides \(0, 1\)"):
        SmoothnessPenalty(model, **terms, backend=backend).accumulate_grad()
    assert [g is None for g in grads_of(model)] == [g is None for g in before]
    model[4].weight.grad = torch.zeros(4, 8, dtype=torch.float64)
    SmoothnessPenalty(model, **terms, backend=backend).accumulate_grad()


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"first_order": -1.0}, ValueError, "first_order must be finite and at least 0, got -1.0"),
        ({"second_order": float("inf")}, ValueError, "second_order must be finite .*got inf"),
        ({"nuclear": "1"}, TypeError, "nuclear must be a number, got str"),
        ({"first_order": True}, TypeError, "first_order must be a number, got bool"),
        ({"norm": "l3"}, ValueError, "norm must be one of .*got 'l3'"),
        ({"unfolding": "row"}, ValueError, "unfolding must be one of .*got 'row'"),
        ({"dim": 0.5}, TypeError, "dim must be an int or a tuple of ints, got 0.5"),
        ({"dim": (1, 1)}, ValueError, "dim must not name an axis twice"),
        ({"backend": "metal"}, ValueError, "backend must be None or one of"),
        ({"method": "qr"}, ValueError, "method must be one of .*got 'qr'"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"every": 2.0}, TypeError, "every must be an int, got float"),
        ({"select": "conv"}, TypeError, "select must be callable, got str"),
        ({"model": nn.ReLU()}, ValueError, "model has no weight to penalise"),
        ({"model": []}, ValueError, "model has no weight to penalise"),
        ({"model": None}, TypeError, "model must be a module or an iterable of parameters, got NoneType"),
        ({"model": [3]}, TypeError, "model must be a module or an iterable of parameters"),
        ({"model": [torch.ones(3, dtype=torch.int64)]}, TypeError, "weight 0 must have .*int64"),
        ({"model": [torch.ones(3)], "select": lambda *_: True}, TypeError, "select needs a module"),
    ],
)
def test_bad_arguments(kwargs: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SmoothnessPenalty(**{"model": small_model(), **kwargs})


def test_a_tensor_is_no_iterable_of_parameters() -> None:
    with pytest.raises(TypeError, match="model must be a module or an iterable of parameters, got a tensor"):
        SmoothnessPenalty(nn.Linear(4, 4).weight)
