"""`smoothk.importance`: Fisher information of singular directions and of outputs, against exact values in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from small_models import MODELS, parameter_count
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smoothk import compress, factorize, importance, plan_ranks
from smoothk.candidates import find_candidates
from smoothk.importance import direction_importance, output_importance


def both(layer: nn.Module) -> tuple[str, ...]:
    return ("channel", "spatial") if isinstance(layer, nn.Conv2d) else ("channel",)


def test_a_classifier_gets_the_exact_fisher(monkeypatch: pytest.MonkeyPatch) -> None:
    """For logits W x the expectation over the labels has a closed form."""
    monkeypatch.setattr(importance, "DRAWS", 3000)
    model = nn.Sequential(nn.Linear(5, 4)).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    (found,) = direction_importance(model, dict(find_candidates(model).layers), both, [x], "categorical").values()
    u, s, v = torch.linalg.svd(model[0].weight.detach(), full_matrices=False)
    p = model(x).detach().softmax(1)
    scores = (p.unsqueeze(1) - torch.eye(4, dtype=torch.float64)) @ u  # [inputs, label, direction]
    exact = (p.unsqueeze(2) * (scores * (x @ v.mT).unsqueeze(1) * s).square()).sum((0, 1))
    torch.testing.assert_close(found["channel"], exact, rtol=0.1, atol=0.01 * float(exact.max()))


def test_other_outputs_are_taken_as_gaussian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "DRAWS", 3000)
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Unflatten(1, (2, 2))).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    found = direction_importance(model, dict(find_candidates(model).layers), both, [x])["0"]["channel"]
    _, s, v = torch.linalg.svd(model[0].weight.detach(), full_matrices=False)
    exact = s.square() * (x @ v.mT).square().sum(0) / model(x).detach().square().mean()
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.01 * float(exact.max()))


def test_outputs_of_a_classifier_get_the_exact_fisher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "DRAWS", 3000)
    model = nn.Sequential(nn.Linear(5, 4)).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    (found,) = output_importance(model, ["0"], [x], "categorical").values()
    p = model(x).detach().softmax(1)
    exact = torch.diag(p.sum(0)) - p.mT @ p
    torch.testing.assert_close(found, exact[None], rtol=0.1, atol=0.02 * float(exact.max()))


EXACT = {  # Fisher information of one output vector, by likelihood
    "categorical": lambda z: torch.diag_embed(z.softmax(1)) - z.softmax(1).unsqueeze(2) * z.softmax(1).unsqueeze(1),
    "bernoulli": lambda z: torch.diag_embed(z.sigmoid() * (1 - z.sigmoid())),
    "gaussian": lambda z: torch.eye(z.shape[1]).double().expand(len(z), -1, -1) / z.square().mean(),
}


@pytest.mark.parametrize("likelihood", importance.LIKELIHOODS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_scores_have_the_fisher_information_of_their_likelihood(likelihood: str, shape: tuple[int, ...]) -> None:
    output, generator = torch.randn(5, 4, *shape, dtype=torch.float64) * 2, torch.Generator().manual_seed(1)
    rows = output.movedim(1, -1).reshape(-1, 4)
    exact = EXACT["categorical" if likelihood == "auto" else likelihood](rows)
    if likelihood == "auto":  # and a tenth of what Gaussian outputs would have
        size = exact.diagonal(dim1=-2, dim2=-1).mean()
        exact = exact + 0.1 * size * torch.eye(4)
    times = 10_000
    score = importance._score(output.repeat(times, *(1,) * (output.dim() - 1)), generator, likelihood)
    assert score.dtype == output.dtype
    g = score.movedim(1, -1).reshape(times, -1, 4)
    torch.testing.assert_close(
        torch.einsum("tnc,tnd->ncd", g, g) / times, exact, rtol=0.05, atol=0.05 * float(exact.max())
    )


def test_what_all_logits_have_in_common_matters_to_several_labels() -> None:
    """Softmax does not see it; a network of several labels, or of values, lives on it."""
    model, shift = nn.Sequential(nn.Linear(5, 4)).double(), torch.full((4, 1), 0.5).double()
    rest = torch.linalg.qr(torch.eye(4).double() - shift @ shift.mT)[0][:, :3]
    v = torch.linalg.qr(torch.randn(5, 4).double())[0].mT
    model[0].weight.data = torch.cat([shift, rest], 1) @ (torch.tensor([4.0, 3.0, 2.0, 1.0])[:, None] * v)
    layers, x = dict(find_candidates(model).layers), torch.randn(300, 5, dtype=torch.float64)
    first, second = {}, {}
    for likelihood in importance.LIKELIHOODS:
        found = direction_importance(model, layers, both, [x], likelihood)["0"]["channel"]
        first[likelihood], second[likelihood] = found[:2].tolist()
    assert first["categorical"] < 1e-9 * second["categorical"]
    assert first["bernoulli"] > 0.5 * second["bernoulli"] and first["gaussian"] > 0.5 * second["gaussian"]
    assert 0.05 * second["auto"] < first["auto"] < 0.5 * second["auto"]


@pytest.mark.parametrize("likelihood", ["auto", "categorical", "bernoulli"])
def test_outputs_that_saturate_are_values(likelihood: str) -> None:
    """Softmax and sigmoid of such are 0 and 1: every score is 0, which says nothing."""
    model, x = nn.Sequential(nn.Linear(5, 4, bias=False)), torch.randn(6, 5)
    model[0].weight.data *= 1e6
    layers = dict(find_candidates(model).layers)
    found, expected = (direction_importance(model, layers, both, [x], kind) for kind in (likelihood, "gaussian"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    outputs = [output_importance(model, ["0"], [x], kind)["0"] for kind in (likelihood, "gaussian")]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    assert found["0"]["channel"].min() > 0 and outputs[0].any()


def test_values_beside_masks_and_in_half_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    masked = importance._score(torch.tensor([[3.0, -math.inf, 4.0, 5.0]]), generator, "gaussian")
    assert masked[0, 1] == 0 and masked.count_nonzero() == 3
    large = importance._score(torch.full((5, 4), 1e4, dtype=torch.float16), generator, "gaussian")
    assert large.dtype is torch.float16 and 0.5e-4 < large.float().square().mean().sqrt() < 2e-4
    with pytest.raises(ValueError, match="calibration must give finite outputs, got NaN or Inf"):
        importance._score(torch.tensor([[math.nan, 1.0]]), generator, "gaussian")


def test_a_likelihood_that_does_not_fit() -> None:
    model, x = nn.Sequential(nn.Linear(20, 20), nn.Flatten(0)), torch.randn(8, 20)
    with pytest.raises(
        ValueError, match=r"likelihood 'categorical' needs outputs \[N, classes, ...\], got \[160\]; .* 'bernoulli'"
    ):
        plan_ranks(model, 0.5, calibration=[x], likelihood="categorical")
    with pytest.raises(ValueError, match="likelihood must be one of 'auto', 'categorical', .* got 'softmax'"):
        compress(model, 0.5, calibration=[x], likelihood="softmax")


def test_gradients_are_those_of_the_output_itself() -> None:
    """Not of what an operation in place makes of it; a layer that is called twice counts both times."""
    shared = nn.Conv2d(4, 4, 3, padding=1, groups=2)
    models = [nn.Sequential(nn.Conv2d(3, 4, 1), act, shared, act, shared, nn.Flatten()).double()
              for act in (nn.ReLU(inplace=True), nn.ReLU())]  # fmt: skip
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    found, expected = (output_importance(model, ["0", "2"], [x]) for model in models)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert found["2"].shape == (2, 2, 2)
    outputs, value = [], x
    for layer in models[1]:
        value = layer(value)
        outputs.append(value)
    generator, total = torch.Generator().manual_seed(0), torch.zeros(1, 4, 4).double()
    for _ in range(importance.DRAWS):
        score = importance._score(value, generator, "auto")
        (g,) = torch.autograd.grad(value, [outputs[0]], score, retain_graph=True)
        total += torch.einsum("nchw,ndhw->cd", g, g)
    torch.testing.assert_close(found["0"], total / importance.DRAWS, rtol=1e-9, atol=1e-12)


class Block(nn.Module):
    """What follows writes into the output of a layer, a view; it may be computed again for its gradient."""

    def __init__(self, in_place: bool = False, again: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 6)
        self.in_place, self.again = in_place, again

    def middle(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = y.add_(1).relu_() if self.in_place else (y + 1).relu()
        return self.b(y) + y

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = checkpoint(self.middle, x, use_reentrant=False) if self.again else self.middle(x)
        return {"logits": self.c(y).mean(1), "features": y}


@pytest.mark.parametrize("options", [{"in_place": True}, {"again": True}], ids=str)
def test_outputs_do_not_depend_on_how_a_model_computes(options: dict) -> None:
    plain, other, batches = Block(), Block(**options), [torch.randn(4, 3, 5) for _ in range(2)]
    other.load_state_dict(plain.state_dict())
    expected, found = (output_importance(model, ["a", "b"], batches) for model in (plain, other))
    assert expected.keys() == {"a", "b"}
    torch.testing.assert_close(found, expected)
    (alone,) = output_importance(plain, ["b"], batches).values()  # whatever else is asked for
    torch.testing.assert_close(alone, expected["b"])


def test_very_wide_layers_have_no_importance(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 9)), [torch.randn(50, 5)]
    expected = output_importance(model, ["0", "1"], batches)
    monkeypatch.setattr(importance, "WIDE", 8)
    found = output_importance(model, ["0", "1"], batches)
    assert found.keys() == {"0"}
    assert torch.equal(found["0"], expected["0"])


def test_layers_without_gradients_have_no_importance() -> None:
    class Frozen(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self[0](x)
            return self[1](x)

    model, batches = Frozen(nn.Linear(20, 20), nn.Linear(20, 20)), [torch.randn(50, 20)]
    assert output_importance(model, ["0", "1"], batches).keys() == {"1"}
    assert output_importance(model, ["0"], batches) == output_importance(model, [], batches) == {}
    for keep, exclude in ((0.6, ["1"]), (1.0, [])):
        compress(model, keep, batches, exclude=exclude)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_of_every_kind_of_layer(name: str) -> None:
    model = MODELS[name][0]().train().requires_grad_(False)
    state, batches = copy.deepcopy(model.state_dict()), [MODELS[name][1]() for _ in range(2)]
    before, layers = torch.get_rng_state(), find_candidates(model).layers
    for key, found in output_importance(model, layers, batches).items():
        groups, rows = getattr(layers[key], "groups", 1), layers[key].weight.shape[0]
        assert found.shape == (groups, rows // groups, rows // groups)
        assert torch.linalg.eigvalsh(found).min() >= -1e-6 * found.abs().max() and found.abs().max() > 0
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before) and not any(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules()) and all(m.training for m in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_layer(name: str) -> None:
    model = MODELS[name][0]().train().requires_grad_(False)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    batches = [MODELS[name][1]() for _ in range(2)]
    state, layers = torch.get_rng_state(), find_candidates(model).layers
    found, again = (direction_importance(model, layers, both, batches) for _ in range(2))
    for key, by_scheme in found.items():
        for scheme, values in by_scheme.items():
            assert torch.equal(values, again[key][scheme]) and (values >= 0).all()
            assert (values.sum() > 0) == (key != "idle"), "no input reaches 'idle'"
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state) and not any(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())


class Weighted(nn.Module):
    """Two equal layers, one of which hardly counts in the output: weights alone cannot tell them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(24, 24, bias=False), nn.Linear(24, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) + 1e-3 * self.b(x)).unsqueeze(2)


@pytest.mark.parametrize("cost", ["params", "macs"])
def test_ranks_go_to_the_layer_that_counts(cost: str) -> None:
    model, batches = Weighted(), [torch.randn(50, 24) for _ in range(2)]
    options = {"cost": cost, "example_input": batches[0]}
    free, calibrated = plan_ranks(model, 0.5, **options), plan_ranks(model, 0.5, calibration=batches, **options)
    parameters = {name: [plan.layers[name].parameters for plan in (free, calibrated)] for name in ("a", "b")}
    assert parameters["a"][0] < parameters["a"][1] and parameters["b"][0] > parameters["b"][1]
    errors = []
    for plan in (free, calibrated):
        small = factorize(model, plan).requires_grad_(False)
        errors.append(sum(float((small(x) - model(x).detach()).square().sum()) for x in batches))
    assert errors[1] < errors[0]
    squares = torch.linalg.svdvals(model.b.weight.detach().double()).square()
    share = float(squares[: calibrated.layers["b"].rank].sum() / squares.sum())
    assert calibrated.layers["b"].energy == pytest.approx(share), "a plan reports energies, not importance"


@pytest.mark.parametrize("name", MODELS)
def test_the_budget_is_kept_and_the_plan_real(name: str) -> None:
    model, batches = MODELS[name][0](), [MODELS[name][1]() for _ in range(3)]
    keep = 0.85 if name == "plain" else 0.6
    plan = plan_ranks(model, keep, calibration=batches)
    assert plan.parameters == parameter_count(factorize(model, plan)) <= math.floor(keep * plan.parameters_before)
    assert plan_ranks(model, keep, calibration=batches) == plan, "the same inputs give the same plan"


def test_only_as_many_inputs_as_needed_are_read() -> None:
    read = []

    class Batches:
        def __iter__(self):
            for i in range(100):
                read.append(i)
                yield torch.randn(200, 24)

    plan_ranks(Weighted(), 0.5, calibration=Batches())
    assert max(read) == 2  # 600 inputs, and the first batch of all was looked at


def test_a_model_without_outputs_to_differentiate_is_refused() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(20, 20)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).argmax(1)

    with pytest.raises(ValueError, match="calibration needs a model with differentiable .* outputs, got none"):
        plan_ranks(Counts(), 0.5, calibration=[torch.randn(3, 20)])


def test_a_model_on_meta_is_refused() -> None:
    with pytest.raises(ValueError, match="model must hold values for calibration"):
        plan_ranks(Weighted().to("meta"), 0.5, calibration=[torch.randn(3, 24, device="meta")])


def test_outputs_that_are_not_finite_are_refused() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) / 0

    with pytest.raises(ValueError, match="calibration must give finite outputs, got NaN or Inf"):
        direction_importance(Broken(), {"layer": Broken().layer}, both, [torch.randn(3, 5)])
