"""The other methods: folding, whitened SVD, pruning by Torch-Pruning, Trained Rank Pruning."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import parameters, residual_network
from torch import nn

from smoothk import LowRankConv2d
from smoothk.recipes import methods
from smoothk.recipes.baselines import balf, channels, folding, pruning, trp


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(24, 1, 8, 8, generator=generator) for _ in range(3)]


def all_groups(model: nn.Module) -> list[channels.Channels]:
    return channels.inner_channels(model) + channels.stream_channels(model)


def test_every_channel_is_written_and_read_once() -> None:
    model = residual_network()
    groups = all_groups(model)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert sorted(id(c) for g in groups for c, _ in g.writers) == sorted(map(id, convolutions))
    readers = [m for m in [*convolutions, model.fc] if m is not model.conv1]
    assert sorted(id(m) for g in groups for m in g.readers) == sorted(map(id, readers))


@pytest.mark.parametrize("keep", [0.7, 0.3, 0.15])
@pytest.mark.parametrize("stream", [False, True])
def test_counts_are_those_of_the_network(keep: float, stream: bool) -> None:
    model = residual_network()
    groups = all_groups(model) if stream else channels.inner_channels(model)
    counts = channels.uniform_counts(model, groups, keep)
    predicted = channels._parameters(model, groups, counts)
    for group, count in zip(groups, counts, strict=True):
        channels.select(group, torch.arange(count))
    assert parameters(model) == predicted <= keep * parameters(residual_network())
    assert model(batches()[0]).shape == (24, 10)


def duplicated() -> tuple[nn.Module, nn.Module]:
    """A network, and one of twice its channels that computes the same: every channel is there twice."""
    small, large = residual_network(0.25), residual_network(0.5)
    twice = lambda t: t.repeat_interleave(2, 0)  # noqa: E731
    state = {}
    for name, value in small.state_dict().items():
        if value.dim() == 0:
            state[name] = value
        elif name == "conv1.weight":
            state[name] = twice(value)
        elif name == "fc.weight":
            state[name] = value.repeat_interleave(2, 1) / 2
        elif name == "fc.bias":
            state[name] = value
        elif value.dim() == 4:
            state[name] = twice(value).repeat_interleave(2, 1) / 2
        else:
            state[name] = twice(value)
    large.load_state_dict(state)
    return small, large


def test_folding_merges_equal_channels_without_loss() -> None:
    small, large = duplicated()
    x = batches()[0]
    torch.testing.assert_close(large(x), small(x), rtol=1e-4, atol=1e-5)
    before = copy.deepcopy(large.state_dict())
    keep = (parameters(small) + 1) / parameters(large)
    folded = folding.fold(large, keep)
    assert parameters(folded) == parameters(small)
    torch.testing.assert_close(folded(x), small(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in large.state_dict().items())


def test_folding_keeps_every_channel_at_full_size() -> None:
    model, x = residual_network(), batches()[0]
    torch.testing.assert_close(folding.fold(model, 1.0)(x), model(x), rtol=1e-4, atol=1e-5)


def test_folding_takes_means_and_adds_up_what_is_read() -> None:
    conv, norm, head = nn.Conv2d(3, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Linear(3, 5)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2)
    old = copy.deepcopy((conv, norm, head))
    folding._merge(channels.Channels([(conv, norm)], [head]), torch.tensor([1, 0, 1]), 2)
    torch.testing.assert_close(conv.weight, torch.stack([old[0].weight[1], old[0].weight[[0, 2]].mean(0)]))
    torch.testing.assert_close(head.weight, torch.stack([old[2].weight[:, 1], old[2].weight[:, [0, 2]].sum(1)], 1))
    for name in ("weight", "bias", "running_mean", "running_var"):
        before, after = getattr(old[1], name), getattr(norm, name)
        torch.testing.assert_close(after, torch.stack([before[1], before[[0, 2]].mean()]))
    assert norm(conv(torch.randn(2, 3, 5, 5))).shape == (2, 2, 3, 3)


def test_clusters_are_all_in_use_and_the_obvious_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]], dtype=torch.float64)
    truth = torch.arange(4).repeat(8)
    points = centres[truth] + 0.1 * torch.randn(32, 2, generator=generator)
    members = folding._cluster(points, 4, generator)
    assert len(set(zip(truth.tolist(), members.tolist(), strict=True))) == 4
    same = folding._cluster(torch.ones(6, 3, dtype=torch.float64), 4, generator)
    assert set(same.tolist()) == {0, 1, 2, 3}


def test_folding_needs_projections() -> None:
    with pytest.raises(ValueError, match="ResNet with projection shortcuts, got ResNet"):
        folding.fold(residual_network(1.0, "resnet20"), 0.5)
    with pytest.raises(ValueError, match="must be at least"):
        folding.fold(residual_network(), 0.001)


def layer_error(dense: nn.Conv2d, small: nn.Conv2d | LowRankConv2d, x: torch.Tensor) -> float:
    return (dense(x) - small(x)).double().square().sum().item()


@torch.no_grad()
@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2}, {"dilation": 2, "padding": "same"}])
def test_whitened_rank_is_the_best_at_the_output(options: dict) -> None:
    """Eckart and Young on the outputs themselves: no factorisation of that rank comes closer on these inputs."""
    conv = nn.Conv2d(4, 12, 3, bias=False, **options)
    x = torch.randn(16, 4, 8, 8) * torch.tensor([3.0, 1.0, 0.1, 0.01]).view(1, 4, 1, 1)
    rank = 3
    small = balf.whitened_svd(conv, [x])(rank * (12 + 36) / 432 + 1e-6)
    assert isinstance(small, LowRankConv2d) and small.rank == rank
    outputs = conv(x).transpose(0, 1).flatten(1).double()
    best = torch.linalg.svdvals(outputs)[rank:].square().sum().item()
    assert layer_error(conv, small, x) == pytest.approx(best, rel=1e-4)
    assert best < 0.99 * layer_error(conv, LowRankConv2d.from_conv(conv, rank), x)


@torch.no_grad()
def test_a_singular_covariance_costs_nothing() -> None:
    """Inputs of two channels out of eight, one of them silent: every output is there, and nothing blows up."""
    conv = nn.Conv2d(8, 24, 1)
    x = torch.zeros(8, 8, 5, 5)
    x[:, 0], x[:, 1] = torch.randn(2, 8, 5, 5)
    small = balf.whitened_svd(conv, [x])(0.6)
    assert isinstance(small, LowRankConv2d) and small.rank == 2
    torch.testing.assert_close(small(x), conv(x))
    silent = balf.whitened_svd(conv, [torch.zeros(8, 8, 5, 5)])(0.9)
    torch.testing.assert_close(silent(torch.zeros(1, 8, 5, 5)), conv(torch.zeros(1, 8, 5, 5)))
    assert all(p.isfinite().all() for p in silent.parameters())


def test_whitened_svd_fills_its_budget() -> None:
    model = residual_network()
    before = copy.deepcopy(model.state_dict())
    compress = balf.whitened_svd(model, batches(), images=40)
    for keep in (0.9, 0.5, 0.2):
        assert 0.9 * keep * parameters(model) < parameters(compress(keep)) <= keep * parameters(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"keep must be at least 0\.\d+ for this model"):
        compress(0.001)


def test_only_so_many_images_are_read() -> None:
    model, seen = residual_network(), []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    balf.whitened_svd(model, batches(), images=40)
    assert seen == [24, 16]


def test_knapsack_is_the_best_there_is() -> None:
    """Against every combination, on convex options, where a price reaches the optimum up to one step."""
    generator = torch.Generator().manual_seed(0)
    options = []
    for size in (4, 5, 3):
        steps = torch.rand(size, generator=generator).double().sort(descending=True).values
        error = torch.cat([steps.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
        options.append((torch.arange(1, size + 2).double(), error))
    for budget in (3, 6, 9, 14):
        picked = balf._knapsack(options, budget)
        grid = [(a, b, c) for a in range(5) for b in range(6) for c in range(4) if a + b + c + 3 <= budget]
        best = min(sum(float(e[i]) for (_, e), i in zip(options, p, strict=True)) for p in grid)
        assert sum(float(e[i]) for (_, e), i in zip(options, picked, strict=True)) == pytest.approx(best)
    assert balf._knapsack(options, 2) is None


def test_truncation_leaves_the_energy_asked_for() -> None:
    model = residual_network()
    fc = model.fc.weight.detach().clone()
    dense = [m.weight.detach().flatten(1).double() for m in model.modules() if isinstance(m, nn.Conv2d)]
    trp.truncate(model, 0.7)
    cut = [m.weight.detach().flatten(1).double() for m in model.modules() if isinstance(m, nn.Conv2d)]
    for before, after in zip(dense, cut, strict=True):
        squares = torch.linalg.svdvals(before).square()
        rank = int(torch.linalg.matrix_rank(after, rtol=1e-5))
        assert squares[:rank].sum() >= (0.7 - 1e-6) * squares.sum() > squares[: rank - 1].sum()
        assert (before - after).square().sum() == pytest.approx(squares[rank:].sum().item(), rel=1e-4, abs=1e-6)
    assert torch.equal(model.fc.weight, fc)


def test_lamp_without_its_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_pruning", None)
    with pytest.raises(ImportError, match="needs Torch-Pruning: pip install torch-pruning"):
        pruning.prune_lamp(residual_network(), batches()[0][:1])


@pytest.mark.slow
def test_lamp_meets_the_budget() -> None:
    pytest.importorskip("torch_pruning")
    model = residual_network()
    x = batches()[0]
    expected = model(x)
    compress = pruning.prune_lamp(model, x[:1])
    for keep in (0.5, 0.2):
        small = compress(keep)
        assert 0.8 * keep * parameters(model) < parameters(small) <= keep * parameters(model)
        assert small(x).shape == (24, 10)
    assert torch.equal(model(x), expected)
    with pytest.raises(ValueError, match="keep must be at least"):
        compress(1e-5)


def test_a_method_without_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lamp = methods.METHODS["lamp"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert lamp.missing and not methods.METHODS["svd"].missing
