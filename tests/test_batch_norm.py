"""`smoothk.recalibrate_batch_norm`: exact means of batch statistics, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from small_models import MODELS
from torch import Tensor, nn

from smoothk import recalibrate_batch_norm
from smoothk.batch_norm import normalising_by_batch


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def settings(model: nn.Module) -> list[tuple]:
    """Modes, flags and momenta."""
    modules = [(m.training, getattr(m, "momentum", 0), getattr(m, "track_running_stats", 0)) for m in model.modules()]
    return [*modules, *((p.requires_grad, p.grad is None) for p in model.parameters())]


def mean_of_batches(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean over the batches of each one's mean and unbiased variance per channel, from the definition."""
    means, variances = [], []
    for batch in batches:
        rows = batch.double().movedim(1, 0).flatten(1)
        mean = rows.sum(1) / rows.shape[1]
        means.append(mean)
        variances.append(((rows - mean[:, None]) ** 2).sum(1) / (rows.shape[1] - 1))
    return sum(means) / len(means), sum(variances) / len(variances)


NORMS = {nn.BatchNorm1d: (), nn.BatchNorm2d: (4, 3), nn.BatchNorm3d: (2, 3, 2)}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("sizes", [(5,), (2, 9, 4)], ids=str)
def test_statistics_are_the_unweighted_mean_over_batches(
    kind: type[nn.Module], momentum: float | None, sizes: tuple[int, ...]
) -> None:
    norm = kind(3, momentum=momentum, dtype=torch.float64)
    norm.running_mean.fill_(7), norm.running_var.fill_(9), norm.num_batches_tracked.fill_(100)
    batches = [2 * torch.randn(n, 3, *NORMS[kind], dtype=torch.float64) + i for i, n in enumerate(sizes)]
    assert recalibrate_batch_norm(norm, batches) is norm
    mean, variance = mean_of_batches(batches)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_var, variance, rtol=1e-12, atol=1e-12)
    assert norm.num_batches_tracked == len(sizes) and norm.momentum == momentum


class Network(nn.Module):
    """Two norms in a row, dropout between them, a norm that no batch reaches and one that keeps no statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.first = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.second = nn.BatchNorm2d(4)
        self.idle = nn.BatchNorm2d(4)
        self.free = nn.BatchNorm2d(4, track_running_stats=False)
        self.layer_norm = nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.conv(x)).relu()
        return self.layer_norm(self.free(self.second(self.dropout(x) + 1)))


def network() -> Network:
    model = Network()
    for norm in (model.first, model.second, model.idle):
        norm.running_mean.uniform_(-3, 3), norm.running_var.uniform_(1, 3), norm.num_batches_tracked.fill_(40)
    return model


def batches(count: int = 3) -> list[Tensor]:
    return [torch.randn(2 + i, 3, 5, 5) for i in range(count)]


@pytest.mark.parametrize("training", [True, False])
def test_only_running_statistics_that_are_reached_change(training: bool) -> None:
    model, data = network().train(training), batches()
    model.dropout.eval(), model.second.requires_grad_(False), model.conv.requires_grad_(False)
    model.second.train(not training), setattr(model.second, "momentum", 0.37)
    before, settings_before = state(model), settings(model)
    recalibrate_batch_norm(model, data)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    parts = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{norm}.{part}" for norm in ("first", "second") for part in parts}
    assert settings(model) == settings_before


def test_later_layers_see_normalised_inputs_and_no_dropout() -> None:
    model, data = network().train(), batches()
    recalibrate_batch_norm(model, data)
    inputs = [[], []]
    with torch.no_grad():
        for batch in data:
            x = model.conv(batch)
            inputs[0].append(x)
            y = nn.functional.batch_norm(x, None, None, model.first.weight, model.first.bias, training=True)
            inputs[1].append(y.relu() + 1)
    for norm, seen in zip((model.first, model.second), inputs, strict=True):
        mean, variance = mean_of_batches(seen)
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_batches_in_half_precision_do_not_lose_the_mean(dtype: torch.dtype) -> None:
    norm = nn.BatchNorm1d(8).to(dtype)
    data = [((1 + i % 3) * torch.randn(16, 8) + 5).to(dtype) for i in range(200)]
    recalibrate_batch_norm(norm, data)
    for actual, expected in zip((norm.running_mean, norm.running_var), mean_of_batches(data), strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_twice_gives_the_same_bits() -> None:
    model, data = network(), batches()
    first = state(recalibrate_batch_norm(model, data))
    torch.testing.assert_close(state(recalibrate_batch_norm(model, data)), first, rtol=0, atol=0)


def test_no_graph_is_kept_and_no_gradient_made() -> None:
    model = network()
    recalibrate_batch_norm(model, [batch.requires_grad_() for batch in batches()])
    assert all(p.grad is None for p in model.parameters())
    assert not any(buffer.requires_grad for buffer in model.buffers())


def test_any_iterable_is_read_once() -> None:
    data = batches()
    expected = state(recalibrate_batch_norm(copy.deepcopy(model := network()), data))
    for iterable in (iter(data), (b for b in data), tuple(data), torch.utils.data.DataLoader(data, batch_size=None)):
        actual = state(recalibrate_batch_norm(copy.deepcopy(model), iterable))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "wrap", [lambda x, y: (x, y), lambda x, y: [x, y], lambda x, y: {"x": x, "scale": y}], ids=["tuple", "list", "dict"]
)
def test_batches_may_be_all_arguments_of_the_model(wrap: Callable) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.norm(x * scale)

    x, scale = torch.randn(6, 3), torch.tensor(5.0)
    model = recalibrate_batch_norm(Scaled(), [wrap(x, scale)])
    torch.testing.assert_close(model.norm.running_mean, (5 * x).mean(0))


@pytest.mark.parametrize(
    ("iterable", "error"),
    [([], ValueError), (iter(()), ValueError), (3, TypeError), (None, TypeError)],
    ids=["list", "iterator", "int", "None"],
)
def test_without_a_batch_nothing_changes(iterable: object, error: type[Exception]) -> None:
    model = network().train()
    before, settings_before = state(model), settings(model)
    with pytest.raises(error, match="batches must"):
        recalibrate_batch_norm(model, iterable)
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)
    assert settings(model) == settings_before


def unreadable() -> Iterator[Tensor]:
    yield from batches(2)
    raise OSError("disk gone")


@pytest.mark.parametrize(
    ("iterable", "error"),
    [
        (unreadable, OSError),
        (lambda: [*batches(2), torch.randn(2, 4, 5, 5)], RuntimeError),  # the model fails on the third batch
        (lambda: [*batches(2), "text"], TypeError),
        (lambda: [*batches(2), torch.empty(0, *batches(1)[0].shape[1:])], ValueError),  # whose mean would be 0
    ],
    ids=["iterable", "shape", "type", "empty"],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_failure_in_the_middle_restores_everything(
    iterable: Callable, error: type[Exception], training: bool
) -> None:
    model = network().train(training)
    model.second.train(not training)
    before, settings_before = state(model), settings(model)
    with pytest.raises(error):
        recalibrate_batch_norm(model, iterable())
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)
    assert settings(model) == settings_before


def test_an_interrupt_restores_everything() -> None:
    def interrupted() -> Iterator[Tensor]:
        yield batches(1)[0]
        raise KeyboardInterrupt

    model = network()
    before, settings_before = state(model), settings(model)
    with pytest.raises(KeyboardInterrupt):
        recalibrate_batch_norm(model, interrupted())
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)
    assert settings(model) == settings_before


@pytest.mark.parametrize("name", ["perceptron", "transformer"])
def test_a_model_without_batch_norm_is_returned_as_it_is(name: str) -> None:
    model, x = (make() for make in MODELS[name])
    before = state(model)
    assert recalibrate_batch_norm(model, [x]) is model
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)


def test_a_norm_that_is_called_twice_sees_both_inputs() -> None:
    norm = nn.BatchNorm1d(2, dtype=torch.float64)
    model = nn.Sequential(norm, nn.ReLU(), norm)
    x = torch.randn(9, 2, dtype=torch.float64)
    recalibrate_batch_norm(model, [x])
    hidden = nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, training=True).relu()
    mean, variance = mean_of_batches([x, hidden.detach()])
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)


def test_calls_with_nothing_do_not_count() -> None:
    """Of an expert that no input of a batch is sent to."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert = nn.BatchNorm1d(2, dtype=torch.float64)

        def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
            return self.expert(x[chosen])

    x = torch.randn(8, 2, dtype=torch.float64)
    some, none = torch.arange(8) < 5, torch.zeros(8, dtype=torch.bool)
    model, start = Routed(), torch.full((2,), 7.0, dtype=torch.float64)
    model.expert.running_mean.copy_(start)
    recalibrate_batch_norm(model, [(x, none), (x, none)])
    assert torch.equal(model.expert.running_mean, start)
    recalibrate_batch_norm(model, [(x, none), (x, some), (x, none)])
    mean, variance = mean_of_batches([x[some]])
    torch.testing.assert_close(model.expert.running_mean, mean)
    torch.testing.assert_close(model.expert.running_var, variance)


def test_a_norm_that_gives_more_than_its_output() -> None:
    class Both(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), x

    model, x = Both(2, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    recalibrate_batch_norm(model, [x])
    torch.testing.assert_close(model.running_mean, x.mean(0))


def pair() -> tuple[nn.Module, nn.Module]:
    """A trained model, and what compression could have made of it."""
    model = network()
    small = copy.deepcopy(model)
    with torch.no_grad():
        small.conv.weight.mul_(0.7), small.first.weight.mul_(1.3)
    return model, small


def test_a_model_that_is_its_own_reference_keeps_its_statistics() -> None:
    model = network()
    before, settings_before = state(model), settings(model)
    recalibrate_batch_norm(model, batches(), reference=model)
    torch.testing.assert_close(state(model), before, rtol=1e-6, atol=1e-6)
    assert settings(model) == settings_before


@pytest.mark.parametrize("training", [True, False])
def test_with_a_reference_its_statistics_change_as_those_on_the_batches(training: bool) -> None:
    model, small = (each.double().train(training) for each in pair())
    data = [batch.double() for batch in batches()]
    before, settings_before = state(model), settings(model)
    on_batches = [recalibrate_batch_norm(copy.deepcopy(each), data) for each in (model, small)]
    recalibrate_batch_norm(small, iter(data), reference=model)
    for norm in ("first", "second"):
        kept, dense, new = (each.get_submodule(norm) for each in (model, *on_batches))
        found = small.get_submodule(norm)
        torch.testing.assert_close(found.running_mean, kept.running_mean + new.running_mean - dense.running_mean)
        share = (new.running_var + found.eps) / (dense.running_var + found.eps)
        grown = kept.running_var + new.running_var - dense.running_var
        expected = torch.where(share > 1, grown, kept.running_var * share)
        torch.testing.assert_close(found.running_var, expected)
    assert torch.equal(small.idle.running_mean, model.idle.running_mean)
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)
    assert settings(model) == settings_before


def test_channels_that_are_dead_on_the_batches_keep_their_statistics() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)).double().eval()
    with torch.no_grad():
        model[0].bias[0], model[3].running_var[:] = -50, 0.5
        model[2].weight.copy_(torch.eye(4))
    small = copy.deepcopy(model)
    with torch.no_grad():
        model[2].weight[0, 1] = 1e-3  # what compression takes from the dead one
    recalibrate_batch_norm(small, [torch.randn(16, 3).double()], reference=model)
    assert (small[3].running_var > 0.2).all()


def test_a_channel_that_was_constant_may_vary() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    nn.init.zeros_(model[0].weight), nn.init.zeros_(model[1].running_var)
    small = copy.deepcopy(model)
    nn.init.eye_(small[0].weight)
    x = torch.randn(50, 2, dtype=torch.float64)
    recalibrate_batch_norm(small, [x], reference=model)
    torch.testing.assert_close(small[1].running_var, x.var(0))


def test_a_reference_with_other_norms_is_refused_before_anything_changes() -> None:
    model, narrow = network(), network()
    narrow.first = nn.BatchNorm2d(5)
    before = state(model)
    with pytest.raises(ValueError, match=r"reference must have batch norm 'first' with statistics of \[4\], got \[5\]"):
        recalibrate_batch_norm(model, batches(), reference=narrow)
    with pytest.raises(ValueError, match=r"reference must have batch norm 'first' .*, got none"):
        recalibrate_batch_norm(model, batches(), reference=model.conv)
    with pytest.raises(TypeError, match="reference must be a torch.nn.Module, got str"):
        recalibrate_batch_norm(model, batches(), reference="model")
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_norms_normalise_as_in_evaluation(frozen: bool) -> None:
    norm = nn.BatchNorm1d(2)
    norm.track_running_stats = not frozen
    norm.running_mean.fill_(3)
    x = torch.randn(9, 2)
    with normalising_by_batch(norm):
        found = norm(x)
    assert norm.track_running_stats is not frozen and (norm.running_mean == 3).all()
    torch.testing.assert_close(
        found, norm.eval()(x) if frozen else (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    )


def test_normalising_by_batch_undoes_what_a_subclass_writes() -> None:
    class Own(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            self.running_mean.add_(1)
            return super().forward(x)

    norm = Own(2)
    with normalising_by_batch(norm):
        norm(torch.randn(9, 2))
    assert (norm.running_mean == 0).all()


def test_what_is_no_model_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got NoneType"):
        recalibrate_batch_norm(None, batches())
