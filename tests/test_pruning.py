"""Magnitude pruning: budgets met exactly, counts that the network bears out, and filters that are really gone."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import parameters, residual_network
from torch import nn

from smoothk.recipes.baselines import pruning
from smoothk.recipes.models import BasicBlock


@pytest.fixture
def network() -> nn.Module:
    return residual_network()


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.3, 0.1])
def test_weight_pruning_meets_the_budget_exactly(network: nn.Module, keep: float) -> None:
    before = copy.deepcopy(network.state_dict())
    pruned = pruning.prune_weights(network, keep)
    assert pruning.count_nonzero(pruned) == int(keep * parameters(network))
    assert {n: p.shape for n, p in pruned.named_parameters()} == {n: p.shape for n, p in network.named_parameters()}
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_weight_pruning_removes_the_smallest_of_all_layers(network: nn.Module) -> None:
    pruned = pruning.prune_weights(network, 0.4)
    pairs = [
        (dense.weight, cut.weight)
        for dense, cut in zip(network.modules(), pruned.modules(), strict=True)
        if isinstance(dense, nn.Conv2d | nn.Linear)
    ]
    removed = torch.cat([dense[cut == 0].abs() for dense, cut in pairs])
    left = torch.cat([dense[cut != 0].abs() for dense, cut in pairs])
    assert removed.max() <= left.min()
    assert all(torch.equal(dense[cut != 0], cut[cut != 0]) for dense, cut in pairs)


def test_weight_pruning_takes_channels_last(network: nn.Module) -> None:
    expected = pruning.prune_weights(network, 0.3)
    pruned = pruning.prune_weights(network.to(memory_format=torch.channels_last), 0.3)
    assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), expected.parameters(), strict=True))


def test_zeros_that_were_there_before_are_not_counted(network: nn.Module) -> None:
    with torch.no_grad():
        network.fc.weight.zero_()
    assert pruning.count_nonzero(network) == parameters(network) - network.fc.weight.numel()


@pytest.mark.parametrize("keep", [0.5, 0.3, 0.15])
def test_filter_pruning_stays_in_the_budget_and_fills_it(network: nn.Module, keep: float) -> None:
    total = parameters(network)
    small = pruning.prune_filters(network, keep)
    assert parameters(small) <= keep * total
    step = sum(
        block.conv1.weight[0].numel() + 2 + block.conv2.weight[:, 0].numel()
        for block in network.modules()
        if isinstance(block, BasicBlock)
    )
    assert parameters(small) > keep * total - step


@pytest.mark.parametrize("n", [1, 2])
def test_filter_pruning_equals_zeroed_filters(network: nn.Module, n: int) -> None:
    """The small network computes what the large one does once the pruned channels are silenced, shift included."""
    small = pruning.prune_filters(network, 0.4, n=n)
    masked = copy.deepcopy(network)
    with torch.no_grad():
        for dense, cut in zip(masked.modules(), small.modules(), strict=True):
            if isinstance(dense, BasicBlock):
                norms = dense.conv1.weight.flatten(1).norm(n, dim=1)
                gone = norms.argsort()[: len(norms) - cut.conv1.out_channels]
                assert len(gone)
                for tensor in (dense.conv1.weight, dense.bn1.weight, dense.bn1.bias):
                    tensor[gone] = 0
                assert torch.equal(dense.conv1.weight[norms.argsort()[len(gone) :].sort().values], cut.conv1.weight)
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(small(x), masked(x), rtol=1e-5, atol=1e-5)


def test_filter_pruning_leaves_its_argument_alone(network: nn.Module) -> None:
    x = torch.randn(2, 1, 8, 8)
    before = network(x)
    small = pruning.prune_filters(network, 0.3)
    assert torch.equal(network(x), before)
    assert not {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in network.parameters()}


@pytest.mark.parametrize("prune", [pruning.prune_weights, pruning.prune_filters])
def test_an_unreachable_budget_names_the_smallest(network: nn.Module, prune) -> None:
    with pytest.raises(ValueError, match=r"keep must be at least 0\.\d+ for this model, got 0.001") as caught:
        prune(network, 0.001)
    smallest = float(str(caught.value).split()[5])
    prune(network, smallest + 1e-4)


def test_filter_pruning_needs_residual_blocks() -> None:
    with pytest.raises(ValueError, match="must have residual blocks"):
        pruning.prune_filters(nn.Sequential(nn.Conv2d(3, 4, 3)), 0.5)
