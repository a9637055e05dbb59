"""`smoothk.factorize` and `smoothk.compress`: new models, old ones untouched."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from small_models import MODELS, REFUSED, parameter_count, perceptron, plain
from torch import Tensor, nn

import smoothk
from smoothk import LowRankConv2d, LowRankLinear, compress, factorize, plan_ranks
from smoothk.importance import output_importance
from smoothk.layers import _LowRank
from smoothk.ranks import METHODS
from smoothk.refit import refit_factors
from smoothk.svd import full_rank


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


def snapshot(model: nn.Module) -> tuple:
    """Everything that a call could change by mistake."""
    values = {name: (id(t), t.detach().clone()) for name, t in model.state_dict(keep_vars=True).items()}
    return (
        values,
        [(name, id(module), module.training) for name, module in model.named_modules()],
        [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
    )


def assert_unchanged(model: nn.Module, before: tuple) -> None:
    after = snapshot(model)
    assert after[1:] == before[1:]
    assert after[0].keys() == before[0].keys()
    for name, (identity, value) in after[0].items():
        assert identity == before[0][name][0] and torch.equal(value, before[0][name][1]), name


def keep_of(name: str) -> float:
    return 0.85 if name == "plain" else 0.6


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_the_argument_is_untouched_and_nothing_is_shared(name: str, method: str) -> None:
    model, x = (make() for make in MODELS[name])
    model.train()
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    for module in list(model.modules())[1::3]:
        module.eval()
    before = snapshot(model)
    plan = plan_ranks(model, keep_of(name), method=method)
    small = factorize(model, plan)
    result = compress(model, keep_of(name), method=method)
    assert_unchanged(model, before)
    for new in (small, result.model):
        ours = {t.untyped_storage().data_ptr() for t in tensors_of(model)}
        assert ours.isdisjoint(t.untyped_storage().data_ptr() for t in tensors_of(new))
        with torch.no_grad():
            for tensor in tensors_of(new):
                tensor.zero_()
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", MODELS)
def test_modes_flags_dtypes_and_order_are_kept(name: str) -> None:
    model = MODELS[name][0]().to(torch.bfloat16)
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 != 0)
    plan = plan_ranks(model, keep_of(name))
    small = factorize(model, plan)
    assert plan.factorized
    assert [n for n, _ in small.named_modules()] == [n for n, _ in model.named_modules()]
    for (layer, old), new in zip(model.named_modules(), small.modules(), strict=True):
        assert new.training == old.training
        factorized = layer in plan.factorized
        assert isinstance(new, _LowRank) == factorized and (factorized or type(new) is type(old))
        if factorized:
            assert new.v.requires_grad == new.u.requires_grad == old.weight.requires_grad
            assert old.bias is None or new.bias.requires_grad == old.bias.requires_grad
        else:
            flags = [[p.requires_grad for p in m.parameters(recurse=False)] for m in (old, new)]
            assert flags[0] == flags[1]
    assert {t.dtype for t in tensors_of(small) if t.is_floating_point()} == {torch.bfloat16}


@pytest.mark.parametrize("name", MODELS)
def test_full_rank_plans_reproduce_the_model(name: str) -> None:
    model, x = (make() for make in MODELS[name])
    model, x = model.double().eval(), x.double()
    plan = plan_ranks(model, keep_of(name), scheme="channel")
    full = {
        n: replace(layer, scheme="channel", rank=full_rank(layer.shape, layer.groups))
        for n, layer in plan.factorized.items()
    }
    small = factorize(model, replace(plan, layers=full))
    assert sum(isinstance(m, _LowRank) for m in small.modules()) == len(full)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-10, atol=1e-12)
    small.train()(x)


def test_shared_modules_are_replaced_everywhere_and_stay_shared() -> None:
    model, x = (make() for make in MODELS["residual"])
    plan = plan_ranks(model, 0.5, method="uniform")
    small = factorize(model, plan)
    assert small.shared is small.again and isinstance(small.shared, LowRankConv2d)
    assert isinstance(small.blocks[0], LowRankConv2d) and isinstance(small.heads["b"], LowRankLinear)
    assert small(x).shape == model(x).shape
    assert parameter_count(small) == plan.parameters
    children = nn.ModuleList([model, nn.ModuleDict({"inner": model})])  # a shared container
    twice = factorize(children, plan_ranks(children, 0.5, method="uniform"))
    assert twice[0] is twice[1]["inner"] and isinstance(twice[0].shared, LowRankConv2d)
    assert isinstance(twice[0].heads["b"], LowRankLinear), "three containers deep"


def test_the_root_itself_is_replaced() -> None:
    for name, kind in (("root convolution", LowRankConv2d), ("root linear", LowRankLinear)):
        model, x = (make() for make in MODELS[name])
        result = compress(model, 0.6)
        assert isinstance(result.model, kind) and list(result.plan.layers) == [""]
        assert result.model(x).shape == model(x).shape


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_factorised_stays_as_it_is(why: str) -> None:
    make, _, shape = REFUSED[why]
    model = nn.ModuleDict({"kept": make(), "other": nn.Linear(40, 40)}).eval()
    x = torch.randn(shape)
    expected = model["kept"](x)
    small = compress(model, 0.8).model
    assert repr(small["kept"]) == repr(model["kept"])
    torch.testing.assert_close(small["kept"](x), expected, rtol=0, atol=0)
    torch.testing.assert_close(model["kept"](x), expected, rtol=0, atol=0)


def test_hooks_and_attributes_of_other_modules_survive() -> None:
    model = perceptron()
    model.tag, calls = {"trained": "yes"}, []
    model.register_forward_hook(lambda *_: calls.append("root"))
    small = compress(model, 0.6).model
    small(torch.randn(1, 20))
    assert calls == ["root"] and small.tag == model.tag and small.tag is not model.tag


def test_training_goes_on_after_compression() -> None:
    small = compress(plain(), 0.85).model.train()
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    small(torch.randn(4, 3, 9, 8)).square().mean().backward()
    optimizer.step()
    after = dict(small.named_parameters())
    assert all(p.grad is not None for p in after.values())
    unmoved = {name for name, old in before.items() if torch.equal(after[name], old)}
    assert unmoved <= {"3.bias"}  # a batch norm follows: its gradient is 0 but for rounding


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e15])
def test_the_scale_of_a_weight_does_not_matter(scale: float) -> None:
    model, x = perceptron(), torch.randn(5, 20)
    model[3].p = 0.0
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (scaled[0], scaled[2], scaled[4]):
            layer.weight.mul_(scale)
    ranks, scaled_ranks = ([layer.rank for layer in plan_ranks(m, 0.4).layers.values()] for m in (model, scaled))
    assert ranks == scaled_ranks
    for layer, other in zip(compress(model, 0.4).model, compress(scaled, 0.4).model, strict=True):
        if isinstance(layer, LowRankLinear):
            torch.testing.assert_close(other.weight / scale, layer.weight, rtol=1e-4, atol=1e-6)
    assert compress(model, 0.4).model(x).isfinite().all()


# --- compress ---------------------------------------------------------------------------------------------------------


def test_the_result_has_model_plan_and_report() -> None:
    model, x = (make() for make in MODELS["residual"])
    options = {"method": "uniform", "scheme": "spatial", "rank_multiple": 2, "exclude": ["stem"], "example_input": x}
    result = compress(model, 0.6, **options)
    assert result.plan == plan_ranks(model, 0.6, **options)
    torch.testing.assert_close(result.model.state_dict(), factorize(model, result.plan).state_dict(), rtol=0, atol=0)
    assert [row[0] for row in result.report.rows] == list(result.plan.layers)
    assert type(result.model.stem[0]) is nn.Conv2d and isinstance(result.model.heads["b"], LowRankLinear)
    for text in (str(result.report), result.report.to_markdown(), result.report.to_csv(), result.report.to_json()):
        assert "heads.b" in text and "excluded" in text


@pytest.mark.parametrize("refit", [True, False])
def test_calibration_refits_and_recalibrates_after_factorising(refit: bool) -> None:
    model, batches = plain().train(), [torch.randn(4, 3, 9, 8) + 1 for _ in range(3)]
    before = snapshot(model)
    result = compress(model, 0.85, calibration=batches, refit=refit)
    assert_unchanged(model, before)
    assert result.model.training
    by_hand = factorize(model, result.plan)
    if refit:
        importance = output_importance(model, result.plan.factorized, batches)
        refit_factors(model, by_hand, batches, importance=importance)
    smoothk.recalibrate_batch_norm(by_hand, batches, reference=model)
    torch.testing.assert_close(result.model.state_dict(), by_hand.state_dict(), rtol=0, atol=0)
    means = [result.model.get_buffer(name) for name, _ in model.named_buffers() if name.endswith("running_mean")]
    assert not all(torch.equal(mean, torch.zeros_like(mean)) for mean in means)


def test_only_global_plans_need_gradients() -> None:
    class Rounded(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).detach()

    model, batches = Rounded(*plain()), [torch.randn(4, 3, 9, 8)]
    by_hand = factorize(model, plan_ranks(model, 0.85, method="uniform"))
    smoothk.recalibrate_batch_norm(refit_factors(model, by_hand, batches), batches, reference=model)
    result = compress(model, 0.85, calibration=batches, method="uniform")
    torch.testing.assert_close(result.model.state_dict(), by_hand.state_dict(), rtol=0, atol=0)


def test_without_calibration_nothing_depends_on_data() -> None:
    model = plain()
    result = compress(model, 0.85)
    for name, value in model.named_buffers():
        assert torch.equal(result.model.get_buffer(name), value)


@pytest.mark.parametrize("once", [lambda b: iter(b), lambda b: (x for x in b), lambda b: map(lambda x: x, b)])
def test_an_iterator_that_can_be_read_once_is_refused(once) -> None:
    batches = [torch.randn(4, 3, 9, 8)]
    with pytest.raises(TypeError, match="calibration must be re-iterable"):
        compress(plain(), 0.85, calibration=once(batches))


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        ([], ValueError, "calibration must hold at least one batch, got none"),
        ([torch.empty(0, 3, 9, 8)], ValueError, r"calibration must hold inputs in every batch, .* \[0, 3, 9, 8\]"),
        ([torch.randn(4, 3, 9, 8), torch.empty(0, 3, 9, 8)], ValueError, "calibration must hold inputs in every batch"),
        (3, TypeError, r"calibration must be re-iterable \(a list, a DataLoader\), got int"),
        ([torch.randn(4, 5, 9, 8)], ValueError, r"calibration must hold .* model, got \[4, 5, 9, 8\] of float32"),
        ([torch.randn(4, 3, 9, 8).double()], ValueError, r"calibration must hold inputs .* of float64"),
        ([(torch.randn(4, 3, 9, 8),) * 2], ValueError, "calibration must hold inputs of the model"),
        ([None, torch.randn(4, 3, 9, 8)], ValueError, "calibration must hold inputs of the model"),
        (["images"], ValueError, "calibration must hold inputs of the model, got <class 'str'>"),
        ([(torch.randn(4, 3, 9, 8), torch.arange(4))], ValueError, r"\(leave the labels out: \[x for x, _ in"),
        ([torch.randn(4, 3, 9, 8, device="meta")], ValueError, "calibration must be on .* device, cpu, got meta"),
    ],
)  # fmt: skip
def test_calibration_that_does_not_fit_is_refused(calibration: object, error: type[Exception], message: str) -> None:
    model = plain().train()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        compress(model, 0.85, calibration=calibration)
    assert_unchanged(model, before)


def test_two_runs_give_the_same_bits() -> None:
    model = plain()
    first, second = (compress(model, 0.85).model.state_dict() for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bias_correction", "refit"])
def test_what_is_no_bool_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a bool, got str"):
        compress(plain(), 0.85, **{name: "no"})


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_plan_of_another_model_names_the_layer() -> None:
    model = perceptron()
    plan = plan_ranks(model, 0.6)
    other_shape = nn.Sequential(nn.Linear(20, 41), nn.ReLU(), nn.Linear(41, 40), nn.Dropout(), nn.Linear(40, 30))
    with pytest.raises(
        ValueError, match=r"plan must fit the model.*layer '\d' has shape \[\d+, 41\].*plan \[\d+, 40\]"
    ):
        factorize(other_shape, plan)
    with pytest.raises(ValueError, match=r"plan must fit the model.*layer '\d'.*no such layer"):
        factorize(nn.ModuleDict({"a": nn.Linear(20, 40)}), plan)
    for wrapper in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        with pytest.raises(ValueError, match="no such layer; one of the two models is in a wrapper"):
            factorize(model, plan_ranks(wrapper, 0.6))
    grouped = nn.Sequential(nn.Conv2d(8, 16, 3, groups=2))
    ungrouped = nn.Sequential(nn.Conv2d(4, 16, 3))
    with pytest.raises(ValueError, match="groups"):
        factorize(ungrouped, plan_ranks(grouped, 0.7))
    with pytest.raises(ValueError, match="plan must fit the model.*low-rank already"):
        factorize(factorize(model, plan), plan)


def test_a_linear_layer_is_no_convolution_of_the_same_shape() -> None:
    """A plan for one may not quietly fit the other."""
    conv_plan = plan_ranks(nn.Sequential(nn.Conv2d(20, 40, 1)), 0.6)
    with pytest.raises(ValueError, match="plan must fit the model"):
        factorize(nn.Sequential(nn.Linear(20, 40)), conv_plan)


@pytest.mark.parametrize("plan", [None, {}, 0.3, "plan"])
def test_what_is_no_plan_is_a_type_error(plan: object) -> None:
    with pytest.raises(TypeError, match=f"plan must be a smoothk.RankPlan, got {type(plan).__name__}"):
        factorize(perceptron(), plan)


@pytest.mark.parametrize("model", [None, "resnet", [nn.Linear(3, 3)]])
def test_what_is_no_model_is_a_type_error(model: object) -> None:
    plan = plan_ranks(perceptron(), 0.6)
    for call in (lambda: compress(model), lambda: factorize(model, plan)):
        with pytest.raises(TypeError, match=f"model must be a torch.nn.Module, got {type(model).__name__}"):
            call()


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="ratio"):
        compress(perceptron(), ratio=0.3)


def test_a_patched_forward_stays() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    original = model[0].forward
    model[0].forward = lambda x: 2 * original(x)
    plan = smoothk.plan_ranks(model, 0.8)
    assert plan.layers["0"].reason == "its forward is patched" and plan.layers["1"].scheme == "channel"


def test_one_batch_in_place_of_batches_is_named() -> None:
    model, batch = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)), torch.randn(4, 3, 8, 8)
    with pytest.raises(TypeError, match="calibration must be an iterable of input batches, got a tensor"):
        smoothk.compress(model, 0.8, calibration=batch)
    with pytest.raises(TypeError, match="batches must be an iterable of input batches, got a tensor"):
        smoothk.recalibrate_batch_norm(model, batch)
