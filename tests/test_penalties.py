"""`smoothk.SmoothnessPenalty`: the two ways to use it agree with each other and with NumPy, and what it penalises."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import numpy_reference
import pytest
import torch
from conftest import assert_close_rel
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import smoothk
from smoothk import SmoothnessPenalty
from smoothk.backend import unavailable_reason

ALL_TERMS = {"first_order": 0.5, "second_order": 0.25, "nuclear": 2.0}


def small_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Weights of 1-d, 2-d and grouped convolutions and a linear layer, well-conditioned in both unfoldings."""
    model = nn.Sequential(
        nn.Conv2d(2, 5, (3, 2)), nn.BatchNorm2d(5), nn.Conv2d(4, 6, 3, groups=2), nn.Conv1d(3, 4, 3), nn.Linear(8, 4)
    )
    return model.to(dtype)


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() > 1]


def expected_terms(weight: Tensor, options: dict) -> dict[str, tuple[float, np.ndarray]]:
    """Raw value and gradient of every term of one weight."""
    w = weight.detach().double().cpu().numpy()
    dim = options.get("dim", 0)
    shared = {"dim": (dim,) if isinstance(dim, int) else dim, "norm": options.get("norm", "l2"),
              "normalized": options.get("normalized", False)}  # fmt: skip
    terms = {}
    for order, name in ((1, "first_order"), (2, "second_order")):
        value, (gradient,) = numpy_reference.difference_penalty([w], order, **shared)
        terms[name] = value, gradient
    value, gradient = numpy_reference.nuclear_norm(w, options.get("unfolding", "channel"))
    if shared["normalized"]:
        norm = np.sqrt(np.sum(w * w))
        value, gradient = value / norm, gradient / norm - value * w / norm**3
    terms["nuclear"] = value, gradient
    return terms


def expected(weights: Sequence[Tensor], options: dict, scale: float = 1.0) -> tuple[float, list[np.ndarray]]:
    """Value and gradients of the whole penalty."""
    coefficients = {"first_order": 1e-3, "second_order": 0, "nuclear": 0}
    coefficients = {name: scale * options.get(name, default) for name, default in coefficients.items()}
    terms = [expected_terms(weight, options) for weight in weights]
    total = sum(c * layer[name][0] for layer in terms for name, c in coefficients.items())
    return total, [sum(c * layer[name][1] for name, c in coefficients.items()) for layer in terms]


OPTIONS = [
    {},
    {"first_order": 0.5},
    {"first_order": 0, "second_order": 0.25},
    {"first_order": 0, "nuclear": 2.0},
    ALL_TERMS,
    {**ALL_TERMS, "unfolding": "spatial", "dim": (0, 1), "norm": "l21"},
    {**ALL_TERMS, "normalized": True, "dim": -1, "norm": "l1"},
    {**ALL_TERMS, "normalized": True, "unfolding": "spatial", "norm": "huber"},
    {**ALL_TERMS, "normalized": True, "dim": (0, 1, 2)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_both_ways_give_numpys_value_and_gradient(options: dict, scale: float) -> None:
    model = small_model()
    weights = weights_of(model)
    value, gradients = expected(weights, options, scale)
    penalty = SmoothnessPenalty(model, **options)
    penalty.scale = scale

    total = penalty()
    total.backward()
    by_autograd = [weight.grad for weight in weights]
    model.zero_grad()
    accumulated = penalty.accumulate_grad()

    assert not accumulated.requires_grad
    for actual in (total, accumulated):
        assert actual.dtype == torch.float64 and actual.shape == ()
        assert_close_rel(actual, value, torch.float64)
    for weight, gradient, wanted in zip(weights, by_autograd, gradients, strict=True):
        np.testing.assert_allclose(gradient.numpy(), wanted, rtol=1e-10, atol=1e-11)
        np.testing.assert_allclose(weight.grad.numpy(), wanted, rtol=1e-10, atol=1e-11)
    assert all(p.grad is None for p in model.parameters() if p.dim() == 1)


@pytest.mark.parametrize("backend", ["torch", "cpp", None])
def test_backends_agree(backend: str | None) -> None:
    if backend and unavailable_reason(backend):
        pytest.skip(unavailable_reason(backend))
    model = small_model(torch.float32)
    options = {"first_order": 0.5, "second_order": 0.25, "norm": "l21", "normalized": True}
    value, gradients = expected(weights_of(model), options)
    penalty = SmoothnessPenalty(model, **options, backend=backend)
    assert_close_rel(penalty(), value, torch.float32)
    assert_close_rel(penalty.accumulate_grad(), value, torch.float32)
    for weight, wanted in zip(weights_of(model), gradients, strict=True):
        assert_close_rel(weight.grad, wanted, torch.float32)


def test_per_layer_has_the_raw_terms_by_name() -> None:
    model = small_model()
    penalty = SmoothnessPenalty(model, first_order=0.5, nuclear=2.0, normalized=True)
    penalty.scale = 0.1
    table = penalty.per_layer()
    assert list(table) == ["0.weight", "2.weight", "3.weight", "4.weight"]
    for weight, terms in zip(weights_of(model), table.values(), strict=True):
        wanted = expected_terms(weight, {"normalized": True})
        assert set(terms) == {"first_order", "nuclear"}
        for name, value in terms.items():
            assert value.shape == () and not value.requires_grad
            assert_close_rel(value, wanted[name][0], torch.float64)
    coefficients = {"first_order": 0.5, "nuclear": 2.0}
    total = sum(0.1 * coefficients[name] * value for terms in table.values() for name, value in terms.items())
    assert_close_rel(penalty(), total, torch.float64)


def test_scale_can_change_at_any_time() -> None:
    model = small_model()
    penalty = SmoothnessPenalty(model)
    one = penalty().item()
    penalty.scale = 4
    assert penalty().item() == pytest.approx(4 * one)
    penalty.scale = 0
    assert penalty() == 0 and penalty.accumulate_grad() == 0
    assert all(p.grad is None for p in model.parameters())
    for bad, error in ((-1.0, ValueError), (float("nan"), ValueError), ("1", TypeError)):
        with pytest.raises(error, match="scale must be"):
            penalty.scale = bad
    assert penalty.scale == 0


def test_default_selection() -> None:
    model = nn.ModuleDict(
        {
            "conv1d": nn.Conv1d(4, 4, 3),
            "conv2d": nn.Conv2d(4, 4, 3),
            "conv3d": nn.Conv3d(4, 4, 3),
            "grouped": nn.Conv2d(4, 8, 3, groups=2),
            "one channel": nn.Conv2d(1, 4, 3),
            "depthwise": nn.Conv2d(4, 4, 3, groups=4),
            "depthwise multiplied": nn.Conv2d(4, 8, 3, groups=4),
            "transposed": nn.ConvTranspose2d(4, 4, 3),
            "linear": nn.Linear(4, 4),
            "embedding": nn.Embedding(9, 4),
            "norm": nn.BatchNorm2d(4),
            "layer norm": nn.LayerNorm((4, 4)),
            "low rank": smoothk.LowRankLinear(4, 4, 2),
            "low rank conv": smoothk.LowRankConv2d(4, 4, 3, 2),
            "attention": nn.MultiheadAttention(4, 2),
        }
    )
    names = [f"{n}.weight" for n in ("conv1d", "conv2d", "conv3d", "grouped", "one channel", "linear")]
    assert list(SmoothnessPenalty(model).per_layer()) == [*names, "attention.out_proj.weight"]


def test_select_sees_every_parameter_with_its_name_and_module() -> None:
    model = small_model()
    seen = []

    def select(name: str, module: nn.Module, parameter: nn.Parameter) -> bool:
        seen.append(name)
        assert model.get_parameter(name) is parameter and any(p is parameter for p in module.parameters(recurse=False))
        return name.endswith("0.weight") or name == "1.weight"

    penalty = SmoothnessPenalty(model, select=select)
    assert seen == [name for name, _ in model.named_parameters()]
    assert list(penalty.per_layer()) == ["0.weight", "1.weight"]  # a vector, too, if asked for
    assert list(SmoothnessPenalty(nn.Linear(3, 4)).per_layer()) == ["weight"]


def test_tied_weights_count_once() -> None:
    tied = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    tied["b"].weight = tied["a"].weight
    shared = nn.Sequential(tied["a"], tied["a"])
    alone = SmoothnessPenalty(tied["a"])
    for model in (tied, shared, [tied["a"].weight, tied["b"].weight]):
        penalty = SmoothnessPenalty(model)
        assert len(penalty.per_layer()) == 1 and penalty() == alone()
        tied.zero_grad()
        penalty.accumulate_grad()
        _, (wanted,) = expected([tied["a"].weight], {})
        assert_close_rel(tied["a"].weight.grad, wanted, torch.float32)


def test_frozen_weights_add_nothing_while_they_are_frozen() -> None:
    model = small_model()
    penalty = SmoothnessPenalty(model, **ALL_TERMS)
    whole = penalty()
    frozen = model[0].weight.requires_grad_(False)
    rest, _ = expected(weights_of(model)[1:], ALL_TERMS)
    assert_close_rel(penalty(), rest, torch.float64)
    assert_close_rel(penalty.accumulate_grad(), rest, torch.float64)
    assert frozen.grad is None and "0.weight" not in penalty.per_layer()
    frozen.requires_grad_()
    assert_close_rel(penalty(), whole, torch.float64)
    model.requires_grad_(False)
    assert penalty() == 0 and penalty.accumulate_grad() == 0 and penalty.per_layer() == {}


def test_an_iterable_of_parameters() -> None:
    model = small_model()
    value, gradients = expected(weights_of(model), ALL_TERMS)
    penalty = SmoothnessPenalty((p for p in weights_of(model)), **ALL_TERMS)
    assert_close_rel(penalty(), value, torch.float64)
    assert_close_rel(penalty.accumulate_grad(), value, torch.float64)
    assert_close_rel(model[0].weight.grad, gradients[0], torch.float64)
    assert list(penalty.per_layer()) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("options", [{"first_order": 0.5}, ALL_TERMS], ids=str)
def test_gradients_are_added_to_those_there(options: dict) -> None:
    model = small_model()
    before = {}
    for weight in weights_of(model)[1:]:
        weight.grad = torch.randn_like(weight)
        before[weight] = weight.grad, weight.grad.clone()
    SmoothnessPenalty(model, **options).accumulate_grad()
    for weight, wanted in zip(weights_of(model), expected(weights_of(model), options)[1], strict=True):
        grad, old = before.get(weight, (weight.grad, torch.zeros_like(weight)))
        assert weight.grad is grad, "the tensor itself: optimizers and DDP buckets hold views of it"
        assert_close_rel(grad, old.numpy() + wanted, torch.float64)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_weights_and_gradients_of_any_layout(backend: str) -> None:
    if unavailable_reason(backend):
        pytest.skip(unavailable_reason(backend))
    options = {"first_order": 0.5, "second_order": 0.25}
    model = small_model()
    model[0].weight.data = model[0].weight.data.to(memory_format=torch.channels_last)
    model[2].weight.grad = torch.zeros_like(model[2].weight.data, memory_format=torch.channels_last)
    model[4].weight.grad = torch.zeros(8, 4, dtype=torch.float64).T
    SmoothnessPenalty(model, **options, backend=backend).accumulate_grad()
    for weight, wanted in zip(weights_of(model), expected(weights_of(model), options)[1], strict=True):
        assert_close_rel(weight.grad, wanted, torch.float64)


@pytest.mark.parametrize("backend", ["torch", None])
def test_weights_too_short_keep_a_missing_gradient(backend: str | None) -> None:
    model = nn.ModuleList([nn.Linear(3, n, bias=False) for n in (1, 2, 5)])
    penalty = SmoothnessPenalty(model, first_order=0, second_order=1.0, backend=backend)
    value = penalty.accumulate_grad()
    assert [layer.weight.grad is None for layer in model] == [True, True, False]
    assert_close_rel(value, expected([model[2].weight], {"first_order": 0, "second_order": 1.0})[0], torch.float32)
    one = nn.Linear(3, 1, bias=False)
    short = SmoothnessPenalty(one, backend=backend)
    assert short.accumulate_grad() == 0 and one.weight.grad is None
    short().backward()
    assert torch.equal(one.weight.grad, torch.zeros_like(one.weight))


def test_a_backend_that_cannot_run_is_named_even_if_no_weight_is_long_enough() -> None:
    one = nn.Linear(3, 1, bias=False, device="meta")
    with pytest.raises(smoothk.BackendUnavailable, match="'cpp' cannot run difference_penalty"):
        SmoothnessPenalty(one, backend="cpp").accumulate_grad()
    assert one.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights(dtype: torch.dtype) -> None:
    model = small_model(dtype)
    for weight in weights_of(model):
        weight.data *= 1e3  # their squares do not fit float16
    options = {**ALL_TERMS, "norm": "l21"}
    value, gradients = expected(weights_of(model), options)
    penalty = SmoothnessPenalty(model, **options)
    total = penalty()
    total.backward()
    by_autograd = [weight.grad for weight in weights_of(model)]
    model.zero_grad()
    for actual in (total, penalty.accumulate_grad()):
        assert actual.dtype == torch.float32
        assert_close_rel(actual, value, dtype)
    for weight, gradient, wanted in zip(weights_of(model), by_autograd, gradients, strict=True):
        for actual in (gradient, weight.grad):
            # One rounding for each of the three terms.
            assert actual.dtype == dtype
            assert np.linalg.norm(actual.double().numpy() - wanted) < 2 * torch.finfo(dtype).eps * np.linalg.norm(
                wanted
            )


@pytest.mark.parametrize("normalized", [False, True])
def test_autocast_changes_nothing(normalized: bool) -> None:
    model = small_model(torch.float32)
    penalty = SmoothnessPenalty(model, **ALL_TERMS, normalized=normalized)

    def results() -> list[Tensor]:
        model.zero_grad()
        total = penalty()
        total.backward()
        gradients = [weight.grad for weight in weights_of(model)]
        model.zero_grad()
        return [total, penalty.accumulate_grad(), *gradients, *(weight.grad for weight in weights_of(model))]

    outside = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = results()
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@pytest.mark.parametrize("way", ["forward", "accumulate_grad"])
def test_a_gradient_scaler_does_not_change_the_penalty(way: str) -> None:
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    penalty = SmoothnessPenalty(model, first_order=0.5)
    if way == "forward":
        scaler.scale(penalty()).backward()
        scaler.unscale_(optimizer)
    else:
        model.weight.grad = torch.zeros_like(model.weight)
        scaler.scale(model.weight.sum() * 0).backward()
        scaler.unscale_(optimizer)
        penalty.accumulate_grad()
    assert_close_rel(model.weight.grad, expected([model.weight], {"first_order": 0.5})[1][0], torch.float32)
    before = model.weight.detach().clone()
    scaler.step(optimizer)
    assert_close_rel(model.weight, before - 0.1 * model.weight.grad, torch.float32)


def test_a_training_step_with_either_way_is_the_same() -> None:
    torch.manual_seed(3)
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    models = [nn.Linear(6, 3, dtype=torch.float64)]
    models.append(copy.deepcopy(models[0]))
    for i, model in enumerate(models):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        penalty = SmoothnessPenalty(model, **ALL_TERMS)
        for _ in range(3):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            if i == 0:
                (loss + penalty()).backward()
            else:
                loss.backward()
                penalty.accumulate_grad()
            optimizer.step()
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())


@pytest.mark.parametrize("options", [{"nuclear": 0.0}, {}, {"normalized": True}, {"method": "polar"}], ids=str)
@pytest.mark.parametrize("way", ["forward", "accumulate_grad"])
def test_a_compiled_step_has_no_graph_break_and_a_new_scale_compiles_nothing(way: str, options: dict) -> None:
    if way == "accumulate_grad" and unavailable_reason("cpp"):
        pytest.skip("plain PyTorch differentiates inside accumulate_grad, which torch.compile does not trace")
    model = small_model(torch.float32)
    penalty = SmoothnessPenalty(model, **{**ALL_TERMS, **options})
    counter = CompileCounter()

    def step() -> Tensor:
        loss = sum((weight**2).sum() for weight in weights_of(model))
        return loss + getattr(penalty, way)()

    def results(step: Callable[[], Tensor]) -> list[Tensor]:
        for weight in weights_of(model):
            weight.grad = torch.ones_like(weight)
        value = step()
        value.backward()
        return [value, *(weight.grad for weight in weights_of(model))]

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for scale in (1.0, 0.5, 0.0, 2.0):
        penalty.scale = scale
        for actual, wanted in zip(results(compiled), results(step), strict=True):
            assert_close_rel(actual, wanted, torch.float32)
    assert counter.frame_count == 1


def test_it_has_no_parameters_and_says_what_it_does() -> None:
    penalty = SmoothnessPenalty(small_model(), nuclear=0.5, norm="l1")
    assert not list(penalty.parameters()) and not penalty.state_dict() and not list(penalty.children())
    for part in ("4 weights", "first_order=0.001", "nuclear=0.5", "'l1'"):
        assert part in repr(penalty)


@pytest.mark.parametrize("backend", ["torch", "cpp", None])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_gradients_of_another_dtype(backend: str | None, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    if backend and unavailable_reason(backend):
        pytest.skip(unavailable_reason(backend))
    dtype, grad_dtype = dtypes
    model = small_model(dtype)
    wide = model[4].weight
    wide.grad_dtype = grad_dtype
    wide.grad = torch.zeros(wide.shape, dtype=grad_dtype)
    penalty = SmoothnessPenalty(model, first_order=0.5, second_order=0.25, backend=backend)
    if backend == "cpp" and grad_dtype == torch.float64:
        with pytest.raises(smoothk.BackendUnavailable, match="gradients of torch.float32.* got torch.float64"):
            penalty.accumulate_grad()
        assert model[0].weight.grad is None and not wide.grad.any()
        return
    value, gradients = expected(weights_of(model), {"first_order": 0.5, "second_order": 0.25})
    assert_close_rel(penalty.accumulate_grad(), value, torch.float32)
    for weight, wanted in zip(weights_of(model), gradients, strict=True):
        assert_close_rel(weight.grad, wanted, torch.float32 if weight is wide else dtype)
    assert wide.grad.dtype == grad_dtype


def test_without_an_active_term_it_is_still_differentiable() -> None:
    layer = nn.Linear(4, 4).double()
    penalty = SmoothnessPenalty(layer)
    penalty.scale = 0.0
    penalty().backward()
    assert not layer.weight.grad.any()
    layer.requires_grad_(False)
    assert penalty().dtype == torch.float64
