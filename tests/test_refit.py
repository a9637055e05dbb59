"""`smoothk.refit.refit_factors`: least squares of the factors against the dense layers' outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from small_models import MODELS, Residual, plain
from torch import Tensor, nn

import smoothk
from smoothk import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLinear, refit, regression
from smoothk.layers import _LowRank
from smoothk.refit import refit_factors
from smoothk.regression import directions, fit, patches, rows
from smoothk.unfolding import fold, unfold

# every kind of low-rank layer and geometry, and the shape of its input
GEOMETRIES: dict[str, tuple[Callable[[], _LowRank], tuple[int, ...]]] = {
    "linear": (lambda: LowRankLinear(7, 9, 4), (3, 5, 7)),
    "1-d": (lambda: LowRankConv1d(6, 8, 3, 2, stride=2, padding=1, groups=2), (2, 6, 11)),
    "3-d": (lambda: LowRankConv3d(3, 5, (1, 2, 3), 4, padding=(0, 1, 1)), (2, 3, 4, 5, 6)),
    **{
        f"{scheme}, {mode}, {padding}": (
            lambda scheme=scheme, mode=mode, padding=padding: LowRankConv2d(
                6, 8, (3, 5), 3, stride=1 if padding == "same" else (2, 3), padding=padding, dilation=(2, 1), groups=2,
                padding_mode=mode, scheme=scheme,
            ),
            (2, 6, 12, 13),
        )
        for scheme, mode, padding in product(("channel", "spatial"), ("zeros", "circular"), ((2, 1), "same", "valid"))
    },
}  # fmt: skip


@pytest.fixture
def all_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "POSITIONS", 10**9)


@pytest.mark.parametrize("most", [3, 10**9])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_patches_times_the_weight_are_the_outputs(monkeypatch: pytest.MonkeyPatch, name: str, most: int) -> None:
    monkeypatch.setattr(regression, "POSITIONS", most)
    dense, small = pair(GEOMETRIES[name][0])
    x = torch.randn(GEOMETRIES[name][1], dtype=torch.float64)
    groups = getattr(dense, "groups", 1)
    with torch.no_grad():
        found = unfold(dense.weight, "channel", groups) @ patches(small, x) + dense.bias.reshape(groups, -1, 1)
        expected = rows(small, dense(x))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if name != "linear" and most == 3:
        assert found.shape[-1] == 3 * len(x)
        one = rows(small, dense(x[0]))  # an image without a batch
        torch.testing.assert_close(one, expected[..., :3])


def pair(make: Callable[[], _LowRank], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, _LowRank]:
    """A dense layer and its low-rank copy."""
    new = make().to(dtype)
    dense = new.to_linear() if isinstance(new, LowRankLinear) else new.to_conv()
    with torch.no_grad():
        dense.weight.normal_()
        dense.bias.normal_()
    if isinstance(new, LowRankLinear):
        return dense, LowRankLinear.from_linear(dense, new.rank)
    return dense, type(new).from_conv(dense, new.rank, scheme=new.scheme)


@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_one_layer_gets_the_least_squares_solution(
    all_positions: None, monkeypatch: pytest.MonkeyPatch, name: str, is_wide: bool
) -> None:
    """u and the bias against numpy's `lstsq` for the v that came out; in the channel scheme no v is better, and the
    best reads what the dense layer reads, so that a wide layer gets it as well."""
    make, shape = GEOMETRIES[name]
    dense, small = pair(make)
    if is_wide:
        monkeypatch.setattr(regression, "WIDE", small.weight[0].numel() - 1)
    keeps_v = is_wide and name == "linear"  # which has more rows than columns
    batches = [torch.randn(shape, dtype=torch.float64) @ torch.diag(torch.linspace(2, 0.1, shape[-1]).double()) + 0.5
               for _ in range(40)]  # fmt: skip
    refit_factors(nn.Sequential(dense), nn.Sequential(small), batches, ridge=0)
    groups = getattr(dense, "groups", 1)
    x = torch.cat([patches(small, x) for x in batches], -1)
    y = torch.cat([rows(small, dense(x).detach()) for x in batches], -1)
    taps = small.kernel_size[1] if getattr(small, "scheme", "") == "spatial" else 1
    v = small.v.detach().reshape(groups, small.rank, -1)
    columns = x if taps == 1 else torch.stack(
        [x.reshape(groups, -1, taps, x.shape[-1])[:, :, j] for j in range(taps)], 1
    )  # fmt: skip
    hidden = v @ x if taps == 1 else (v.unsqueeze(1) @ columns).flatten(1, 2)
    for group in range(groups):
        design = torch.cat([hidden[group], torch.ones_like(hidden[group][:1])]).mT.numpy()
        solution = np.linalg.lstsq(design, y[group].mT.numpy(), rcond=None)[0]
        best = np.square(design @ solution - y[group].mT.numpy()).sum()
        found = torch.cat([rows(small, small(x).detach()) for x in batches], -1)[group]
        wanted = y[group]
        error = float((found - wanted).square().sum())
        assert error == pytest.approx(best, rel=1e-4)
        if taps == 1 and not keeps_v:  # reduced-rank regression: the covariance of the outputs beyond the rank
            centred = wanted - wanted.mean(1, keepdim=True)
            tail = torch.linalg.eigvalsh(centred @ centred.mT)[: -small.rank].sum()
            assert error == pytest.approx(float(tail), rel=1e-2)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_errors_count_by_their_importance(all_positions: None, name: str) -> None:
    """In the channel scheme nothing of that rank is better; in the spatial one it is better than without."""
    make, shape = GEOMETRIES[name]
    dense, small = pair(make)
    alike = copy.deepcopy(small)
    batches = [torch.randn(shape, dtype=torch.float64) for _ in range(12)]
    groups, count = getattr(dense, "groups", 1), dense.weight.shape[0] // getattr(dense, "groups", 1)
    costs = torch.randn(groups, count, count, dtype=torch.float64) * torch.logspace(0, -2, count)
    costs = 1e6 * costs.mT @ costs  # a factor makes no difference
    refit_factors(nn.Sequential(dense), nn.Sequential(alike), batches, ridge=0)
    refit_factors(nn.Sequential(dense), nn.Sequential(small), batches, ridge=0, importance={"0": costs})
    metric = regression._evened(costs)
    y = torch.cat([rows(small, dense(x).detach()) for x in batches], -1)

    def error(layer: nn.Module) -> float:
        wrong = torch.cat([rows(layer, layer(x).detach()) for x in batches], -1) - y
        return float((metric @ wrong * wrong).sum())

    assert error(small) < 0.9 * error(alike)
    if getattr(small, "scheme", "channel") == "channel":
        root = torch.linalg.cholesky(metric)
        centred = root.mT @ (y - y.mean(-1, keepdim=True))
        tails = torch.linalg.eigvalsh(centred @ centred.mT)[:, : -small.rank].sum()
        assert error(small) == pytest.approx(float(tails), rel=1e-2)


def test_outputs_without_importance_count_alike() -> None:
    dense, small = pair(GEOMETRIES["linear"][0])
    other, batches = copy.deepcopy(small), [torch.randn(60, 7, dtype=torch.float64)]
    refit_factors(nn.Sequential(dense), nn.Sequential(small), batches)
    for costs in ({}, {"0": torch.zeros(1, 9, 9).double()}, {"0": torch.eye(9)[None]}):
        again = copy.deepcopy(other)
        refit_factors(nn.Sequential(dense), nn.Sequential(again), batches, importance=costs)
        torch.testing.assert_close(again.weight, small.weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_white_inputs_give_the_truncated_svd(scheme: str) -> None:
    """An identity covariance is no reason to differ from Eckart and Young."""
    conv = nn.Conv2d(6, 8, 3, bias=False).double()
    small = LowRankConv2d.from_conv(conv, 3, scheme=scheme)
    eye = torch.eye(54, dtype=torch.float64)[None]
    dense = conv.weight.detach().reshape(1, 8, 54)
    equations = regression.Equations(eye, dense.clone(), torch.zeros(1, 1).double(), 100)
    ((u, v),) = regression._Problem(conv, small, equations).regressed(0.0)
    expected = small.weight.detach()
    torch.testing.assert_close(fold(u @ v, conv.weight.shape, scheme), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("wide", [8192, 16, 5, 1])
@pytest.mark.parametrize("ridge", [0.0, 1.0])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_fit_never_raises_the_error_of_a_layer(
    all_positions: None, monkeypatch: pytest.MonkeyPatch, name: str, ridge: float, wide: int
) -> None:
    make, shape = GEOMETRIES[name]
    dense, small = pair(make)
    monkeypatch.setattr(regression, "WIDE", wide)
    batches = [torch.randn(shape, dtype=torch.float64).relu() for _ in range(3)]

    def error() -> float:
        with torch.no_grad():
            return sum(float((small(x) - dense(x)).square().sum()) for x in batches)

    before = error()
    for _ in range(2):
        refit_factors(nn.Sequential(dense), nn.Sequential(small), batches, ridge=ridge)
        after = error()
        assert after <= before * (1 + 1e-9)
        before = after


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_whole_models_come_closer_to_the_dense_output(name: str, together: int) -> None:
    model, _ = (make() for make in MODELS[name])
    model = model.double().eval()
    batches = [torch.cat([MODELS[name][1]().double() for _ in range(15)]) for _ in range(3)]
    small = smoothk.factorize(model, smoothk.plan_ranks(model, 0.85 if name == "plain" else 0.6))
    smoothk.recalibrate_batch_norm(model, batches)
    smoothk.recalibrate_batch_norm(small, batches)
    before = copy.deepcopy(model.state_dict())

    def error() -> float:
        with torch.no_grad():
            return sum(float((small(x) - model(x)).square().sum()) for x in batches)

    plain_error = error()
    assert refit_factors(model, small, batches, together=together) is small
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    smoothk.recalibrate_batch_norm(small, batches)
    assert error() < plain_error
    assert not any(m._forward_hooks for both in (model, small) for m in both.modules())


def tail() -> nn.Module:
    """Layers of both kinds in front of a convolution that will be factorised, and behind it."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 6, bias=False),
        nn.ReLU(),
        nn.Linear(6, 5),
    ).double()


def compress_only(model: nn.Module, name: str) -> nn.Module:
    """``model`` with one low-rank layer."""
    others = [n for n, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear) and n != name]
    return smoothk.factorize(model, smoothk.plan_ranks(model, 0.75, exclude=others))


def test_linear_layers_behind_the_last_low_rank_one_get_the_least_squares_solution() -> None:
    model, batches = tail().eval(), [torch.randn(50, 3, 7, 8, dtype=torch.float64) for _ in range(3)]
    smoothk.recalibrate_batch_norm(model, batches)
    small = compress_only(model, "1")
    before = copy.deepcopy(small)
    refit_factors(model, small, batches, ridge=0)
    for name, parameter in small.named_parameters():  # nothing else, in front of it or a convolution, has changed
        assert torch.equal(parameter, before.get_parameter(name)) == (name[0] not in "179"), name
    small.train(), model.train()
    for index in (7, 9):
        with torch.no_grad():
            x = torch.cat([small[:index](batch) for batch in batches])
            y = torch.cat([model[: index + 1](batch) for batch in batches]).numpy()
            found = small[index](x).numpy()
        design = torch.cat([x, torch.ones_like(x[:, :1])], 1).numpy() if index == 9 else x.numpy()
        best = design @ np.linalg.lstsq(design, y, rcond=None)[0]
        assert np.square(found - y).sum() == pytest.approx(np.square(best - y).sum(), rel=1e-6)


def decaying(columns: int, rows: int) -> nn.Linear:
    """A layer that a low rank changes little."""
    layer = nn.Linear(columns, rows)
    layer.weight.data *= torch.logspace(0, -2, columns)
    return layer


class Samples(nn.Module):
    """A dense head on what a low-rank trunk's features choose, or what chance adds to them."""

    def __init__(self, choose: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.trunk, self.head, self.choose = decaying(20, 30), nn.Linear(30, 6), choose

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.choose(self.trunk(x)))


@pytest.mark.parametrize(
    ("choose", "is_fitted"),
    [
        (lambda h: h.relu(), True),
        (lambda h: 0.1 * h + torch.randn_like(h), False),
        (lambda h: h[h.sum(1).topk(40).indices], False),
        (lambda h: h[h[:, 0] > 0], False),
        (lambda h: h if len(h) == 200 else h[: 50 + int(1e4 * h.square().sum()) % 100], False),  # another number
    ],
    ids=["none", "chance", "topk", "threshold", "sometimes"],
)
def test_a_head_that_sees_other_samples_stays_as_it_is(choose: Callable, is_fitted: bool) -> None:
    model, batches = Samples(choose), [torch.randn(count, 20) for count in (200, 190)]
    small = compress_only(model, "trunk")
    refit_factors(model, small, batches)
    assert torch.equal(small.head.weight, model.head.weight) != is_fitted
    assert torch.equal(small.head.bias, model.head.bias) != is_fitted


def test_a_linear_layer_that_shares_its_bias_stays_as_it_is() -> None:
    model = Residual()
    model.heads["a"] = nn.Linear(12, 20)
    model.heads["b"].bias = model.heads["a"].bias
    small = compress_only(model, "blocks.0")
    refit_factors(model, small, [torch.randn(60, 3, 6, 7)])
    for name in "ab":
        assert torch.equal(small.heads[name].weight, model.heads[name].weight)
    assert torch.equal(small.heads["a"].bias, model.heads["a"].bias)


def test_the_last_low_rank_layer_may_be_one_that_is_not_fitted() -> None:
    model = nn.Sequential(*(decaying(*size) for size in ((20, 30), (30, 30), (30, 30), (30, 6))))
    small = smoothk.factorize(model, smoothk.plan_ranks(model, 0.75, exclude=["1", "3"]))
    batches = [torch.randn(300, 20)]
    refit_factors(model, small, batches, exclude=["2"])
    assert torch.equal(small[1].weight, model[1].weight)
    assert not torch.equal(small[3].weight, model[3].weight)


@pytest.mark.parametrize("wide", [30, 15, 5])
def test_wide_layers_are_fitted_in_the_directions_that_they_read(monkeypatch: pytest.MonkeyPatch, wide: int) -> None:
    """No Gram matrix of more than ``wide`` rows is formed; a layer without so few directions stays as it is."""
    torch.manual_seed(0)
    model = nn.Sequential(decaying(20, 40), nn.ReLU(), decaying(40, 10), nn.ReLU(), nn.Linear(10, 3)).double().eval()
    ranks = {"0": 8, "2": 6}
    x = torch.randn(600, 20, dtype=torch.float64)
    small = nn.Sequential(*copy.deepcopy(model))
    for name, rank in ranks.items():
        small[int(name)] = LowRankLinear.from_linear(model[int(name)], rank)
    narrow, sizes = copy.deepcopy(small), []
    monkeypatch.setattr(regression, "WIDE", wide)

    def spy(*args: Any) -> None:
        sizes.append(args[2].xx.shape[-1])
        fit(*args)

    monkeypatch.setattr(refit, "fit", spy)
    refit_factors(model, narrow, [x])
    assert sizes == {30: [20, 10, 10], 15: [8, 10, 10], 5: [3]}[wide]
    with torch.no_grad():
        errors = [float((each(x) - model(x)).square().mean()) for each in (small, narrow)]
        assert errors[1] < {30: 0.35, 15: 0.35, 5: 0.8}[wide] * errors[0], errors  # 0.28 in all directions
        if wide == 5:
            assert torch.equal(narrow[:3](x), small[:3](x))


@pytest.mark.parametrize("is_tuned", [False, True])
@pytest.mark.parametrize("name", ["1-d", "channel, zeros, same", "spatial, zeros, same"])
def test_directions_are_what_the_weights_read(monkeypatch: pytest.MonkeyPatch, name: str, is_tuned: bool) -> None:
    dense, small = pair(GEOMETRIES[name][0])
    if is_tuned:
        small.v.data += 0.1 * torch.randn_like(small.v)
    assert directions(dense, small) is None
    columns = small.weight[0].numel()
    monkeypatch.setattr(regression, "WIDE", columns - 1)
    basis, eye = directions(dense, small), torch.eye(columns, dtype=torch.float64)
    torch.testing.assert_close(basis @ basis.mT, eye[: basis.shape[1], : basis.shape[1]].expand(2, -1, -1))
    read = [small.weight] if "spatial" in name else [small.weight, dense.weight]
    for weight in read:
        rows = unfold(weight.detach(), "channel", 2)
        torch.testing.assert_close(rows @ basis.mT @ basis, rows)
    expected = small.rank * 5 if "spatial" in name else 4 + small.rank * is_tuned
    assert basis.shape == (2, expected, columns)


def test_few_inputs_do_no_harm() -> None:
    """They say nothing of most directions of 64: with the ridge alone the errors are 1.5 and 1.3 times those before."""
    torch.manual_seed(1)
    model = nn.Sequential(decaying(20, 64), nn.ReLU(), decaying(64, 64), nn.ReLU(), nn.Linear(64, 5)).double()
    small = smoothk.factorize(model, smoothk.plan_ranks(model, 0.7))
    x = torch.randn(3000, 20, dtype=torch.float64)

    def error(count: int) -> float:
        fitted = copy.deepcopy(small)
        if count:
            refit_factors(model, fitted, [x[:count]])
        with torch.no_grad():
            return float((fitted(x) - model(x)).square().mean())

    before = error(0)
    assert error(3000) < 0.5 * before
    assert max(error(8), error(24)) < before


def test_a_classifier_keeps_what_is_better() -> None:
    model = nn.Sequential(decaying(20, 30), nn.ReLU(), nn.Linear(30, 6)).double()
    small, batches = compress_only(model, "0"), [torch.randn(400, 20, dtype=torch.float64)]
    refit_factors(model, small, batches, ridge=0)
    fitted = small[2].weight.clone()
    assert (fitted - model[2].weight).norm() > 0.2 * fitted.norm()
    refit_factors(model, small, batches, ridge=1e3)  # close to the dense weight
    torch.testing.assert_close(small[2].weight, fitted, rtol=0.1, atol=0.1 * fitted.std().item())


def test_linear_layers_in_front_and_excluded_ones_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 6))
    batches = [torch.randn(200, 20) for _ in range(2)]
    small = compress_only(model, "2")
    refit_factors(model, small, batches)
    assert torch.equal(small[0].weight, model[0].weight)
    assert not torch.equal(small[4].weight, model[4].weight)
    small = compress_only(model, "2")
    refit_factors(model, small, batches, exclude=["4"])
    assert torch.equal(small[4].weight, model[4].weight)
    assert torch.equal(small[4].bias, model[4].bias)
    dense = {"keep": 0.75, "calibration": batches, "exclude": ["0", "4"]}
    assert torch.equal(smoothk.compress(model, **dense).model[4].weight, model[4].weight)


def statistics(model: nn.Module) -> list[Tensor]:
    return [t.clone() for t in (*model.parameters(), *model.buffers())]


@pytest.mark.parametrize("batch", [torch.randn(2, 5, 9, 8), torch.full((2, 3, 9, 8), float("nan")), torch.randn(3)])
def test_after_an_error_the_model_is_as_it_was(batch: Tensor) -> None:
    model = plain().eval()
    small = smoothk.factorize(model, smoothk.plan_ranks(model, 0.85))
    small.train()
    before = statistics(small)
    with pytest.raises((RuntimeError, ValueError)):
        refit_factors(model, small, [torch.randn(2, 3, 9, 8), batch])
    torch.testing.assert_close(statistics(small), before, rtol=0, atol=0)
    assert all(m.training for m in small.modules()) and not any(m._forward_hooks for m in small.modules())


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_inputs_that_span_nothing_work(value: float) -> None:
    dense, small = pair(GEOMETRIES["linear"][0], torch.float32)
    refit_factors(nn.Sequential(dense), nn.Sequential(small), [torch.full((4, 7), value)], ridge=0)
    x = torch.full((1, 7), value)
    torch.testing.assert_close(small(x), dense(x), rtol=1e-4, atol=1e-4)
    assert all(torch.isfinite(p).all() for p in small.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"together": 0}, ValueError, "together must be an int of at least 1, got 0"),
        ({"ridge": -1.0}, ValueError, "ridge must be at least 0, got -1.0"),
        ({"exclude": ["a"]}, ValueError, "exclude must name modules of the model, got 'a'"),
        ({"importance": {"3": torch.eye(4)}}, ValueError, r"importance of '3' must be \[2, 16, 16\], got \[4, 4\]"),
        ({"importance": {"3": torch.full((2, 16, 16), torch.nan)}}, ValueError, "importance of '3' must be finite"),
        ({"exclude": "0"}, TypeError, "exclude must be a collection of names, got '0'"),
        ({"batches": []}, ValueError, "batches must hold at least one batch, got none"),
        ({"batches": [torch.empty(0, 3, 9, 8)]}, ValueError, r"batches must hold inputs .* shape \[0, 3, 9, 8\]"),
        ({"model": 3}, TypeError, "model must be a torch.nn.Module, got int"),
        ({"small": None}, TypeError, "small must be a torch.nn.Module, got NoneType"),
    ],
)
def test_bad_arguments(options: dict, error: type[Exception], message: str) -> None:
    model = plain()
    small = smoothk.factorize(model, smoothk.plan_ranks(model, 0.85))
    with pytest.raises(error, match=message):
        refit_factors(**{"model": model, "small": small, "batches": [torch.randn(2, 3, 9, 8)], **options})
