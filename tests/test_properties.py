"""Laws that hold for every input, checked on many drawn by hypothesis. The draws are the same in every run."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import parameter_count
from torch import Tensor, nn

import smoothk
from smoothk import LowRankConv2d, RankPlan, plan_ranks
from smoothk.backend import unavailable_reason
from smoothk.functional import NORMS, accumulate_difference_penalty, difference_terms
from smoothk.ranks import METHODS, SCHEMES
from smoothk.svd import full_rank
from smoothk.unfolding import UNFOLDINGS

BACKENDS = [name for name in ("torch", "cpp") if unavailable_reason(name) is None]

backends, orders, norms = st.sampled_from(BACKENDS), st.sampled_from((1, 2)), st.sampled_from(NORMS)
factors = st.floats(-8, 8).filter(lambda c: abs(c) > 1e-3)
seeds = st.integers(0, 2**31)
shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


def law(examples: int) -> Callable:
    """Many fast examples, always the same; seeds and threads of the autouse fixture do not matter to them."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@st.composite
def tensors(draw: st.DrawFn, shape: st.SearchStrategy[tuple[int, ...]] = shapes) -> Tensor:
    """float64 tensors: dense, with repeated rows, with zeros; of any scale."""
    generator = torch.Generator().manual_seed(draw(seeds))
    weight = torch.randn(draw(shape), generator=generator, dtype=torch.float64) * draw(st.sampled_from((1e-4, 1, 50)))
    match draw(st.integers(0, 3)):
        case 0:
            weight[: len(weight) // 2] = weight[0].clone()
        case 1:
            weight = weight * (torch.rand(weight.shape, generator=generator) < 0.5)
    return weight


def penalty(weights: Tensor | list[Tensor], order: int, backend: str, **options) -> Tensor:
    return smoothk.difference_penalty(weights, order, backend=backend, **options)


def close(actual: Tensor | float, expected: Tensor | float, scale: float = 0.0) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=1e-10,
        atol=1e-12 + 1e-10 * scale,
    )


# --- difference penalty -----------------------------------------------------------------------------------------------


@law(650)
@given(tensors(), orders, backends, factors)
def test_l2_scales_with_the_square(weight: Tensor, order: int, backend: str, c: float) -> None:
    close(penalty(c * weight, order, backend), c**2 * penalty(weight, order, backend))


@law(650)
@given(tensors(), orders, backends, factors)
def test_l1_scales_with_the_absolute_value(weight: Tensor, order: int, backend: str, c: float) -> None:
    close(penalty(c * weight, order, backend, norm="l1"), abs(c) * penalty(weight, order, backend, norm="l1"))


@law(650)
@given(tensors(), orders, backends, factors)
def test_l21_scales_with_its_eps(weight: Tensor, order: int, backend: str, c: float) -> None:
    scaled = penalty(c * weight, order, backend, norm="l21", eps=c**2 * 1e-2)
    close(scaled, abs(c) * penalty(weight, order, backend, norm="l21", eps=1e-2))


@law(650)
@given(tensors(), orders, backends, st.sampled_from(("l2", "l1")), factors, st.integers(-4, 3))
def test_normalized_is_blind_to_scale(weight: Tensor, order: int, backend: str, norm: str, c: float, dim: int) -> None:
    options = {"norm": norm, "dim": dim, "normalized": True}
    close(penalty(c * weight, order, backend, **options), penalty(weight, order, backend, **options))


@law(650)
@given(tensors(), orders, norms, backends, st.integers(1, 6), st.booleans())
def test_equal_rows_cost_nothing(
    row: Tensor, order: int, norm: str, backend: str, count: int, normalized: bool
) -> None:
    weight = row.expand(count, *row.shape)
    value = penalty(weight, order, backend, norm=norm, eps=1e-20, normalized=normalized)
    scale = weight.norm().item() if normalized and weight.any() else 1
    assert value <= (count * 1e-10 / scale if norm == "l21" else 0)


@law(650)
@given(tensors(), norms, backends, st.integers(1, 8))
def test_second_order_does_not_see_ramps(step: Tensor, norm: str, backend: str, count: int) -> None:
    ramp = torch.stack([i * step.round(decimals=2) for i in range(count)])
    value = penalty(ramp, 2, backend, norm=norm, eps=1e-20)
    assert value <= 1e-9 * (1 + ramp.abs().max() * ramp.numel())


@law(650)
@given(tensors(), orders, norms, backends, st.booleans(), st.integers(-4, 3))
def test_reversed_rows_cost_the_same(
    weight: Tensor, order: int, norm: str, backend: str, normalized: bool, dim: int
) -> None:
    flipped = weight.flip(dim) if -weight.dim() <= dim < weight.dim() else weight
    options = {"norm": norm, "normalized": normalized, "dim": dim}
    close(penalty(flipped, order, backend, **options), penalty(weight, order, backend, **options))


@law(650)
@given(tensors(), orders, norms, backends, st.randoms(use_true_random=False))
def test_permuted_columns_cost_the_same(
    weight: Tensor, order: int, norm: str, backend: str, random: random.Random
) -> None:
    columns = weight.reshape(len(weight), -1)
    shuffled = columns[:, random.sample(range(columns.shape[1]), columns.shape[1])]
    close(penalty(shuffled, order, backend, norm=norm), penalty(weight, order, backend, norm=norm))


@law(650)
@given(st.lists(tensors(), max_size=4), orders, norms, backends, st.booleans())
def test_tensors_add_up(weights: list[Tensor], order: int, norm: str, backend: str, normalized: bool) -> None:
    options = {"norm": norm, "normalized": normalized}
    whole = penalty(weights, order, backend if weights else "torch", **options)
    close(whole, sum(penalty(w, order, backend, **options) for w in weights))


@law(650)
@given(tensors(), orders, norms, backends, st.booleans(), st.sets(st.integers(0, 4), min_size=1))
def test_axes_add_up(weight: Tensor, order: int, norm: str, backend: str, normalized: bool, dims: set[int]) -> None:
    options = {"norm": norm, "normalized": normalized}
    whole = penalty(weight, order, backend, dim=tuple(dims), **options)
    close(whole, sum(penalty(weight, order, backend, dim=d, **options) for d in dims))


@law(650)
@given(tensors(), orders, norms, backends, st.booleans(), st.data())
def test_an_axis_may_lie_anywhere(
    weight: Tensor, order: int, norm: str, backend: str, normalized: bool, data: st.DataObject
) -> None:
    axes = data.draw(st.permutations(range(weight.dim())))
    options = {"norm": norm, "normalized": normalized}
    moved = penalty(weight.permute(axes), order, backend, dim=0, **options)
    close(moved, penalty(weight, order, backend, dim=axes[0], **options))


@law(650)
@given(tensors(), orders, backends, st.booleans(), factors)
def test_the_gradient_obeys_eulers_theorem(
    weight: Tensor, order: int, backend: str, normalized: bool, c: float
) -> None:
    """``<W, grad P(W)>`` is the degree of homogeneity times ``P(W)``: 2 for l2, 1 for l1, 0 when normalised."""
    for norm, degree in (("l2", 2), ("l1", 1)):
        leaf = weight.clone().requires_grad_()
        value = penalty(leaf, order, backend, norm=norm, normalized=normalized)
        (gradient,) = torch.autograd.grad(value, leaf)
        along = (leaf * gradient).sum().detach()
        close(along, 0 if normalized else degree * value.detach(), scale=value.item())


@law(650)
@given(tensors(), orders, norms, st.booleans(), st.integers(-4, 3))
def test_backends_agree(weight: Tensor, order: int, norm: str, normalized: bool, dim: int) -> None:
    leaves = [weight.clone().requires_grad_() for _ in BACKENDS]
    values = [
        penalty(leaf, order, backend, norm=norm, normalized=normalized, dim=dim)
        for leaf, backend in zip(leaves, BACKENDS, strict=True)
    ]
    gradients = [torch.autograd.grad(value, leaf)[0] for value, leaf in zip(values, leaves, strict=True)]
    for value, gradient in zip(values, gradients, strict=True):
        close(value, values[0])
        close(gradient, gradients[0], scale=gradients[0].abs().max().item() if gradient.numel() else 0)


@law(650)
@given(tensors(), orders, norms, backends, st.integers(-8, 8))
def test_a_constant_added_to_every_entry_costs_nothing(
    weight: Tensor, order: int, norm: str, backend: str, constant: int
) -> None:
    weight = (weight * 1024).round() / 1024  # sums and differences of these are exact
    close(penalty(weight + constant, order, backend, norm=norm), penalty(weight, order, backend, norm=norm))


@law(650)
@given(
    st.lists(tensors(), min_size=1, max_size=3), norms, backends, st.booleans(), st.sets(st.integers(0, 3), min_size=1)
)
def test_both_orders_at_once_are_the_two_alone(
    weights: list[Tensor], norm: str, backend: str, normalized: bool, dims: set[int]
) -> None:
    options = {"norm": norm, "normalized": normalized, "dim": tuple(dims), "backend": backend}
    for w in weights:
        w.requires_grad_()
    both = difference_terms(weights, [1, 2], **options)
    alone = [smoothk.difference_penalty(weights, order, **options) for order in (1, 2)]
    close(both, torch.stack(alone))
    scale = both.detach().max().item()
    gradients = [torch.autograd.grad(value, weights) for value in (3 * both[0] + 0.5 * both[1], *alone)]
    for together, first, second in zip(*gradients, strict=True):
        close(together, 3 * first + 0.5 * second, scale=scale)


@law(650)
@given(st.lists(tensors(), min_size=1, max_size=3), orders, norms, backends, st.booleans(), factors)
def test_accumulating_adds_the_gradient(
    weights: list[Tensor], order: int, norm: str, backend: str, normalized: bool, c: float
) -> None:
    options = {"norm": norm, "normalized": normalized, "backend": backend}
    leaves = [w.clone().requires_grad_() for w in weights]
    value = smoothk.difference_penalty(leaves, order, **options)
    grads = [w.flip(-1).contiguous() for w in weights]
    expected = [g + c * d for g, d in zip(grads, torch.autograd.grad(value, leaves), strict=True)]
    coefficients = torch.tensor([c], dtype=torch.float64)
    (term,) = accumulate_difference_penalty(weights, grads, coefficients, [order], dim=(0,), **options)
    close(term, c * value.detach())
    for grad, wanted in zip(grads, expected, strict=True):
        close(grad, wanted, scale=wanted.abs().max().item())


# --- nuclear norm -----------------------------------------------------------------------------------------------------

matrices = tensors(st.tuples(st.integers(1, 7), st.integers(1, 7)))
kernels = tensors(st.tuples(*[st.integers(1, 4)] * 4))
methods = st.sampled_from(("svd", "gram", "auto"))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed))[0]


@law(200)
@given(matrices, methods, seeds)
def test_rotations_do_not_change_the_nuclear_norm(weight: Tensor, method: str, seed: int) -> None:
    rotated = orthogonal(weight.shape[0], seed) @ weight @ orthogonal(weight.shape[1], seed + 1)
    values = [smoothk.nuclear_norm(w, method=method) for w in (weight, rotated)]
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-9)


@law(200)
@given(kernels, st.sampled_from(UNFOLDINGS), methods)
def test_the_nuclear_norm_lies_between_frobenius_norms(weight: Tensor, unfolding: str, method: str) -> None:
    value, frobenius = smoothk.nuclear_norm(weight, unfolding=unfolding, method=method), weight.norm()
    rank = full_rank(weight.shape, 1, unfolding)
    assert (1 - 1e-6) * frobenius <= value <= (1 + 1e-6) * math.sqrt(rank) * frobenius + 1e-9


@law(200)
@given(kernels, st.sampled_from(UNFOLDINGS), methods, factors, seeds)
def test_the_nuclear_norm_is_a_norm(weight: Tensor, unfolding: str, method: str, c: float, seed: int) -> None:
    def norm(w: Tensor) -> Tensor:
        return smoothk.nuclear_norm(w, unfolding=unfolding, method=method)

    other = normal(*weight.shape, seed=seed)
    torch.testing.assert_close(norm(c * weight), abs(c) * norm(weight), rtol=1e-6, atol=1e-9)
    assert norm(weight + other) <= (1 + 1e-6) * (norm(weight) + norm(other)) + 1e-9


@law(200)
@given(kernels, st.sampled_from(UNFOLDINGS), methods)
def test_the_gradient_is_the_dual_certificate(weight: Tensor, unfolding: str, method: str) -> None:
    """``<W, U Vᵀ> = ‖W‖_*``, and no singular value of ``U Vᵀ`` exceeds 1."""
    leaf = weight.requires_grad_()
    value = smoothk.nuclear_norm(leaf, unfolding=unfolding, method=method)
    (gradient,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close((leaf * gradient).sum(), value, rtol=1e-6, atol=1e-9)
    largest = torch.linalg.svdvals(smoothk.unfolding.unfold(gradient, unfolding)).max()
    assert largest <= 1 + 1e-6


# --- layers and plans -------------------------------------------------------------------------------------------------


@law(60)
@given(kernels, st.sampled_from(UNFOLDINGS))
def test_the_error_falls_with_every_rank(weight: Tensor, scheme: str) -> None:
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], dtype=torch.float64)
    conv.weight.data.copy_(weight)
    errors = [
        (LowRankConv2d.from_conv(conv, rank, scheme=scheme).weight - weight).norm().item()
        for rank in range(1, full_rank(weight.shape, 1, scheme) + 1)
    ]
    slack = 1e-7 * weight.norm().item() + 1e-12
    assert all(after <= before + slack for before, after in zip(errors, errors[1:], strict=False))
    assert errors[-1] <= slack


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    torch.manual_seed(draw(seeds))
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            layers.append(nn.Linear(draw(st.integers(4, 24)), draw(st.integers(4, 24))))
        else:
            groups = draw(st.sampled_from((1, 2)))
            channels = [2 * draw(st.integers(2, 8)) for _ in range(2)]
            kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
            layers += [nn.Conv2d(*channels, kernel, groups=groups), nn.BatchNorm2d(channels[1])]
    return nn.Sequential(*layers, nn.Linear(30, 30))


plan_options = st.fixed_dictionaries({"method": st.sampled_from(METHODS), "scheme": st.sampled_from(SCHEMES)})


@law(100)
@given(networks(), st.floats(0.01, 1), plan_options, st.sampled_from((1, 2, 4)))
def test_plans_keep_the_budget_and_survive_json(
    model: nn.Module, keep: float, options: dict, rank_multiple: int
) -> None:
    try:
        plan = plan_ranks(model, keep, rank_multiple=rank_multiple, **options)
    except ValueError as error:
        keep = float(str(error).split("at least ")[1].split()[0])
        plan = plan_ranks(model, keep, rank_multiple=rank_multiple, **options)
    assert RankPlan.from_json(plan.to_json()) == plan
    assert (
        parameter_count(smoothk.factorize(model, plan)) == plan.parameters <= math.floor(keep * parameter_count(model))
    )


@law(60)
@given(networks(), plan_options)
def test_a_larger_budget_keeps_at_least_as_much(model: nn.Module, options: dict) -> None:
    plans = []
    for keep in (0.4, 0.55, 0.7, 0.85, 1.0):
        try:
            plans.append(plan_ranks(model, keep, **options))
        except ValueError:
            assert not plans, "a smaller budget was enough"
    dropped = [sum(1 - layer.energy for layer in plan.layers.values()) for plan in plans]
    if options["method"] == "global":  # the rules of the others do not look at this sum
        assert all(after <= before + 0.05 for before, after in zip(dropped, dropped[1:], strict=False))
    assert dropped[-1] == pytest.approx(0)
