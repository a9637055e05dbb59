"""transformers' Conv1D, which GPT-2 has in place of linear layers; the package itself is not needed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import smoothk
from smoothk import LowRankLinear, SmoothnessPenalty
from smoothk.candidates import find_candidates
from smoothk.latency import measure_layers
from smoothk.macs import count_macs


class Conv1D(nn.Module):
    """As in transformers.pytorch_utils."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(0.2 * torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(x.size()[:-1] + (self.nf,))


@pytest.fixture(autouse=True)
def transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("transformers.pytorch_utils")
    module.Conv1D = Conv1D
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)


def block(device: str = "cpu") -> nn.Module:
    with torch.device(device):
        return nn.Sequential(Conv1D(48, 16), nn.GELU(), Conv1D(16, 48), nn.LayerNorm(16)).double().eval()


def as_linears(model: nn.Module) -> nn.Module:
    """The same network with torch's linear layers."""
    values = model.state_dict()
    hidden = values["0.bias"].numel()
    result = nn.Sequential(nn.Linear(16, hidden), nn.GELU(), nn.Linear(hidden, 16), nn.LayerNorm(16)).double().eval()
    result.load_state_dict({n: v.t() if v.dim() == 2 else v for n, v in values.items()})
    return result


def test_bias_correction_leaves_it_alone() -> None:
    model, x = block(), torch.randn(2, 5, 16).double()
    plain, corrected = (smoothk.compress(model, 0.6, bias_correction=correct).model for correct in (False, True))
    assert torch.equal(plain(x), corrected(x))


def test_it_is_compressed_as_a_linear_layer_is(tmp_path: Path) -> None:
    model, x = block(), torch.randn(2, 5, 16).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = smoothk.compress(as_linears(model), 0.6, example_input=x)
    result = smoothk.compress(model, 0.6, example_input=x)
    # Not the energies: the Gram matrix of a transposed weight rounds in another way.
    assert {n: replace(layer, energy=None) for n, layer in result.plan.layers.items()} == {
        n: replace(layer, energy=None) for n, layer in expected.plan.layers.items()
    }
    assert all(isinstance(result.model[i], LowRankLinear) for i in (0, 2))
    torch.testing.assert_close(result.model(x), expected.model(x), rtol=1e-10, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    smoothk.save(result.model, tmp_path / "small")
    assert torch.equal(smoothk.load(block(), tmp_path / "small")(x), result.model(x))
    assert torch.equal(smoothk.load(lambda: block("meta"), tmp_path / "small")(x), result.model(x))


@pytest.mark.parametrize("hidden", [16, 48])
def test_calibration_is_that_of_a_linear_layer(hidden: int) -> None:
    """Square weights too, where a transposed one fits and is wrong."""
    model = nn.Sequential(Conv1D(hidden, 16), nn.GELU(), Conv1D(16, hidden), nn.LayerNorm(16)).double().eval()
    x = torch.randn(64, 16).double() * torch.logspace(0, -2, 16)
    result = smoothk.compress(model, 0.6, calibration=[x])
    expected = smoothk.compress(as_linears(model), 0.6, calibration=[x])
    ranks = {name: layer.rank for name, layer in expected.plan.layers.items()}
    assert {name: layer.rank for name, layer in result.plan.layers.items()} == ranks and any(ranks.values())
    torch.testing.assert_close(result.model(x), expected.model(x), rtol=1e-6, atol=1e-8)


def test_its_latency_is_measured() -> None:
    model, x = block(), torch.randn(4, 16).double()
    times = measure_layers(model, x, find_candidates(model).layers, lambda _: ("channel",), 0.01)
    assert list(times) == ["0", "2"] and all(times[name].dense > 0 for name in times)


def test_nothing_is_shared_and_flags_are_kept() -> None:
    model = block().train()
    model[0].weight.requires_grad_(False)
    small = smoothk.compress(model, 0.6).model
    assert small.training and small[0].training
    assert not small[0].v.requires_grad and small[0].bias.requires_grad and small[2].v.requires_grad
    assert not {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_excluded_and_tied_ones_stay() -> None:
    model = block()
    plan = smoothk.plan_ranks(model, 0.9, exclude=["0"])
    assert plan.layers["0"].reason == "excluded" and "0" not in plan.factorized and "2" in plan.factorized
    tied = nn.Sequential(nn.Embedding(16, 48), Conv1D(48, 16), Conv1D(40, 48)).eval()
    tied[1].weight = tied[0].weight
    plan = smoothk.plan_ranks(tied, 0.9)
    assert "tied" in plan.layers["1"].reason and list(plan.factorized) == ["2"]


def test_macs_and_plans_on_meta() -> None:
    model, x = block(), torch.randn(2, 5, 16).double()
    assert count_macs(model, x) == 2 * 5 * 2 * 16 * 48
    plan = smoothk.plan_ranks(model, 0.5, cost="macs", example_input=x)
    assert count_macs(smoothk.factorize(model, plan), x) == plan.macs <= 0.5 * plan.macs_before
    assert smoothk.plan_ranks(block("meta"), 0.6).parameters_before == sum(p.numel() for p in model.parameters())


def test_decompress_gives_a_linear_layer() -> None:
    small, x = smoothk.compress(block(), 0.6).model, torch.randn(3, 16).double()
    dense = smoothk.decompress(small)
    assert type(dense[0]) is nn.Linear
    torch.testing.assert_close(dense(x), small(x), rtol=1e-10, atol=1e-12)


def test_penalties_leave_it_out_by_default() -> None:
    """Its rows are inputs: differences along dim 0 would be those of another axis than in every other layer."""
    model = nn.Sequential(block(), nn.Linear(16, 8).double())
    assert list(SmoothnessPenalty(model).per_layer()) == ["1.weight"]
    chosen = SmoothnessPenalty(model, dim=1, select=lambda name, module, p: isinstance(module, Conv1D) and p.dim() == 2)
    expected = SmoothnessPenalty(as_linears(model[0]))
    torch.testing.assert_close(chosen(), expected())


def test_a_subclass_with_a_forward_of_its_own_stays() -> None:
    class Scaled(Conv1D):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    plan = smoothk.plan_ranks(nn.Sequential(Scaled(16, 16), Conv1D(16, 16)), 0.8)
    assert plan.layers["0"].reason == "Scaled has a forward of its own"
