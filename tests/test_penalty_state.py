"""`smoothk.SmoothnessPenalty` keeps little between calls, and what it keeps is never in the way: of inference mode, of
weights that were tied, replaced, restored or transformed, of options set anew, of copies on another device."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

import smoothk
from smoothk import SmoothnessPenalty
from smoothk.outputs import all_tensors

torch_deprecations = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of its own functions
TERMS = {"first_order": 0.5, "nuclear": 0.1}


def square(count: int = 2) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(5, 5) for _ in range(count)))


class Penalised(nn.Module):
    """A model whose forward is its penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.net = square()
        self.penalty = SmoothnessPenalty(self.net, **TERMS, every=3)

    def forward(self) -> Tensor:
        return self.penalty()


def test_inference_leaves_training_as_it_was() -> None:
    model = square()
    with torch.inference_mode():
        penalty = SmoothnessPenalty(model, **TERMS, every=4)
        value = penalty()
    trained = penalty()
    trained.backward()
    torch.testing.assert_close(trained.detach(), value.clone())
    penalty.scale = 0.5
    penalty.accumulate_grad()


def test_a_new_scale_is_for_the_calls_after_it() -> None:
    model = square()
    penalty = SmoothnessPenalty(model, **TERMS)
    value = penalty()
    penalty.scale = 0.25
    value.backward()
    wanted = [weight.grad.clone() for weight in (model[0].weight, model[1].weight)]
    model.zero_grad()
    penalty.scale = 1.0
    penalty().backward()
    for weight, gradient in zip((model[0].weight, model[1].weight), wanted, strict=True):
        assert torch.equal(weight.grad, gradient)


@pytest.mark.parametrize("backend", [None, "torch"])
def test_weights_tied_later_count_once(backend: str | None) -> None:
    model = square()
    penalty = SmoothnessPenalty(model, **TERMS, backend=backend)
    penalty.accumulate_grad()
    model.zero_grad()
    model[1].weight = model[0].weight
    alone = SmoothnessPenalty([model[0].weight], **TERMS)
    wanted = alone.accumulate_grad()
    gradient = model[0].weight.grad.clone()
    torch.testing.assert_close(penalty().detach(), wanted)
    model.zero_grad(set_to_none=False)
    for calls in (1, 2):
        torch.testing.assert_close(penalty.accumulate_grad(), wanted)
        torch.testing.assert_close(model[0].weight.grad, calls * gradient)


@torch_deprecations
def test_transforms_take_the_parameters_they_are_given() -> None:
    models = [Penalised() for _ in range(3)]
    parameters, _ = stack_module_state(models)
    wanted = torch.stack([model().detach() for model in models])
    values = vmap(lambda values: functional_call(models[0], values, ()))(parameters)
    torch.testing.assert_close(values.detach(), wanted)

    first = {name: value[1].detach() for name, value in parameters.items()}
    tangents = {name: torch.randn_like(value) for name, value in first.items()}
    value, slope = jvp(lambda values: functional_call(models[0], values, ()), (first,), (tangents,))
    torch.testing.assert_close(value, wanted[1])
    models[1].zero_grad()
    models[1].penalty().backward()
    gradients = {name: p.grad for name, p in models[1].named_parameters() if p.grad is not None}
    torch.testing.assert_close(slope, sum((tangents[name] * g).sum() for name, g in gradients.items()))


@torch_deprecations
@pytest.mark.parametrize("unfolding", ["channel", "spatial"])
def test_transforms_of_the_nuclear_norm(unfolding: str) -> None:
    def norm(weight: Tensor) -> Tensor:
        return smoothk.nuclear_norm(weight, unfolding=unfolding)

    weight, tangent = torch.randn(2, 6, 4, 3, 3, dtype=torch.float64)
    weight[:, 2:] = 0  # of low rank: no gradient in the other directions
    leaf = weight.clone().requires_grad_()
    norm(leaf).backward()
    torch.testing.assert_close(grad(norm)(weight), leaf.grad)
    torch.testing.assert_close(jvp(norm, (weight,), (tangent,)), (norm(weight), (leaf.grad * tangent).sum()))
    torch.testing.assert_close(vmap(norm)(torch.stack([weight, 3 * weight])), torch.stack([norm(weight)] * 2).mul_(
        torch.tensor([1.0, 3.0], dtype=torch.float64)))  # fmt: skip


@torch_deprecations
@pytest.mark.parametrize("backend", [None, "torch"])
def test_batches_of_gradients(backend: str | None) -> None:
    weight = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)

    def penalty(weight: Tensor) -> Tensor:
        return smoothk.difference_penalty(weight, 2, backend=backend)

    value = penalty(weight)
    (gradient,) = torch.autograd.grad(value, weight, retain_graph=True)
    factors = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (many,) = torch.autograd.grad(value, weight, factors, is_grads_batched=True)
    torch.testing.assert_close(many, factors.view(3, 1, 1) * gradient)
    torch.testing.assert_close(torch.autograd.functional.jacobian(penalty, weight, vectorize=True), gradient)


def test_every_option_set_between_calls_is_that_of_the_next() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, (3, 2)))
    penalty, options = SmoothnessPenalty(model, **TERMS), {}
    for change in ({"dim": (1,)}, {"norm": "l1"}, {"normalized": True}, {"unfolding": "spatial"}, {"backend": "torch"}):
        penalty()
        for name, value in change.items():
            setattr(penalty, name, value)
        options |= change
        wanted = SmoothnessPenalty(model, **TERMS, **options)()
        torch.testing.assert_close(penalty(), wanted)
        torch.testing.assert_close(penalty.accumulate_grad(), wanted.detach())
    for change in ({"nuclear": 0.0}, {"first_order": 2.0}, {"second_order": 0.5}):
        penalty.coefficients.update(change)
        wanted = SmoothnessPenalty(model, **penalty.coefficients, **options)()
        torch.testing.assert_close(penalty(), wanted)
        torch.testing.assert_close(penalty.accumulate_grad(), wanted.detach())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("norm", "l3", "norm must be one of"),
        ("dim", (0, -2), r"dim must not name an axis twice, got \(0, -2\) for 0.weight with 2 axes"),
        ("unfolding", "rows", "unfolding must be one of"),
        ("backend", "metal", "backend must be None or one of"),
    ],
)
def test_options_set_between_calls_are_checked(name: str, value: object, message: str) -> None:
    penalty = SmoothnessPenalty(square())
    with pytest.raises(ValueError, match=message):
        setattr(penalty, name, value)


def test_an_axis_counted_from_both_ends_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"dim must not name an axis twice, got \(1, -1\) for weights\[1\] with 2 axes"
    ):
        smoothk.difference_penalty([torch.randn(3, 4, 5), torch.randn(3, 4)], dim=(1, -1))


def test_factors_of_a_diverged_network_are_forgotten() -> None:
    model = square(1)
    good = copy.deepcopy(model.state_dict())
    penalty = SmoothnessPenalty(model, 0.0, nuclear=1.0, every=5)
    model[0].weight.data[0, 0] = float("inf")
    assert not penalty.accumulate_grad().isfinite()
    model.load_state_dict(good)
    model.zero_grad()
    assert penalty.accumulate_grad().isfinite() and model[0].weight.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo's, at a graph break
def test_shared_factors_compile_few_graphs() -> None:
    penalty, graphs = SmoothnessPenalty(square(), **TERMS, every=20), CompileCounter()
    calls = [torch.compile(call, backend=graphs) for call in (penalty.forward, penalty.accumulate_grad)]
    for _ in range(25):
        for call in calls:
            call()
    assert 0 < graphs.frame_count < 16  # more than the limit of recompilations is not compiled at all


def test_shared_factors_of_a_few_calls_compile_without_a_break() -> None:
    model = square()
    penalty, plain = (SmoothnessPenalty(model, **TERMS, every=3) for _ in range(2))
    compiled = torch.compile(penalty.forward, backend="eager", fullgraph=True)
    for _ in range(8):
        torch.testing.assert_close(compiled(), plain())
        with torch.no_grad():
            model[0].weight.mul_(0.9)


def test_autograd_knows_that_a_gradient_was_written_to() -> None:
    model = square(1)
    weight = model[0].weight
    (gradient,) = torch.autograd.grad(model[0](torch.randn(3, 5)).square().sum(), weight, create_graph=True)
    weight.grad = gradient
    loss = gradient.square().sum()
    SmoothnessPenalty(model).accumulate_grad()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, weight)
    weight.grad = None  # a cycle otherwise


def test_an_error_leaves_no_gradient_behind() -> None:
    model = square(3)
    penalty = SmoothnessPenalty(model)
    model[0].weight.grad = model[1].weight.grad = torch.zeros(5, 5)
    if smoothk.backend.unavailable_reason("cpp") is not None:
        pytest.skip("only the kernel refuses")
    with pytest.raises(RuntimeError, match="grads must not share memory"):
        penalty.accumulate_grad()
    assert model[2].weight.grad is None and not model[0].weight.grad.any()


def test_weights_without_values_are_named_before_others_get_gradients() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5, device="meta"))
    with pytest.raises(ValueError, match="weight 1.weight must hold values as others do"):
        SmoothnessPenalty(model, **TERMS).accumulate_grad()
    assert model[0].weight.grad is None


def test_a_gradient_that_is_part_of_a_buffer_compiles() -> None:
    weight, buffer = nn.Parameter(torch.randn(8, 6)), torch.zeros(100)
    weight.grad = buffer[:48].view(8, 6)  # as DDP's are
    value = torch.compile(SmoothnessPenalty([weight]).accumulate_grad, backend="eager")()
    gradient = weight.grad.clone()
    buffer.zero_()
    torch.testing.assert_close(value, SmoothnessPenalty([weight]).accumulate_grad())
    torch.testing.assert_close(gradient, weight.grad)


def test_a_replaced_parameter_is_freed() -> None:
    model = square(1)
    penalty, old = SmoothnessPenalty(model), weakref.ref(model[0].weight)
    model[0].weight = nn.Parameter(torch.randn(5, 5))
    gc.collect()
    assert old() is None and penalty().item() > 0


def test_copies_have_scales_of_their_own() -> None:
    penalty = SmoothnessPenalty(square(), **TERMS)
    value = penalty()
    other = copy.copy(penalty)
    other.scale = 0.5
    torch.testing.assert_close(penalty(), value)
    torch.testing.assert_close(other(), value / 2)


def test_a_pickled_penalty_has_no_tensor_of_a_device() -> None:
    model = square()
    penalty = SmoothnessPenalty(model, **TERMS)
    assert not list(all_tensors(penalty.__getstate__()))
    _, other = pickle.loads(pickle.dumps((model, penalty)))
    torch.testing.assert_close(other(), penalty())


def test_meta_weights_have_a_meta_norm() -> None:
    assert smoothk.nuclear_norm(torch.empty(4, 3, device="meta")).is_meta


def test_lazy_layers_are_named() -> None:
    with pytest.raises(ValueError, match="weight 0.weight must have a shape, got a lazy layer's"):
        SmoothnessPenalty(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3)))


@pytest.mark.parametrize("size", [2, 3, 8])
def test_small_singular_values_have_exact_directions(size: int) -> None:
    worst = 0.0
    for _ in range(20):
        u, v = torch.linalg.qr(torch.randn(2, size, size, dtype=torch.float64))[0]
        s = torch.ones(size, dtype=torch.float64)
        s[-1] = 1.5 * size * torch.finfo(torch.float32).eps
        weight = ((u * s) @ v.mT).float().requires_grad_()
        smoothk.nuclear_norm(weight).backward()
        left, _, right = torch.linalg.svd(weight.detach().double())
        worst = max(worst, (torch.linalg.norm(weight.grad - left @ right) / size**0.5).item())
    assert worst < 1e-3  # rounding of the Gram matrix in float64 over the square of 4e-7


@pytest.mark.parametrize("method", ["gram", "auto"])
@pytest.mark.parametrize("scale", [1e-42, 1e-39, 1e38])
def test_singular_vectors_of_extreme_weights(method: str, scale: float) -> None:
    weight = torch.randn(4, 5).mul_(scale).requires_grad_()
    smoothk.nuclear_norm(weight, method=method).backward()
    u, _, vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    torch.testing.assert_close(weight.grad, (u @ vh).float(), rtol=0, atol=1e-5)
