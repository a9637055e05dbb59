"""`smoothk.optimize_for_inference`: the same outputs from fewer modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import smoothk
from smoothk.inference import LowRankReLU
from smoothk.recipes.models import build


def with_statistics(model: nn.Module) -> nn.Module:
    """``model`` with batch norms that do something."""
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            if norm.track_running_stats:
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
    return model


def count(model: nn.Module, kind: type) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def check(model: nn.Module, x: Tensor) -> nn.Module:
    """The optimised model, after its outputs and what must not have changed were compared."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = smoothk.optimize_for_inference(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in fast.parameters()}
    assert not shared
    assert not fast.training
    assert not any(p.requires_grad for p in fast.parameters())
    mode = model.training
    wide = copy.deepcopy(model).eval().double()
    with torch.no_grad():
        expected = wide(x.double())
        error = (fast(x) - expected).norm() / expected.norm()
    assert error < 1e-5
    assert model.training == mode
    return fast


@pytest.mark.parametrize(("arch", "size"), [("resnet18", 16), ("resnet20", 16)])
def test_residual_networks(arch: str, size: int) -> None:
    dense = with_statistics(build(arch, num_classes=10, width=0.25 if arch == "resnet18" else 1.0))
    small = smoothk.compress(dense, keep=0.5).model
    low_rank = count(small, smoothk.LowRankConv2d)
    assert low_rank >= 3
    fast = check(small, torch.randn(2, 3, size, size))
    assert count(fast, nn.BatchNorm2d) == 0
    assert count(fast, smoothk.LowRankConv2d) == low_rank
    blocks = [m for m in fast.modules() if isinstance(m, LowRankReLU)]
    # Every one but the projections of shortcuts is followed by a ReLU.
    kinds = {name: isinstance(m, smoothk.LowRankConv2d) for name, m in small.named_modules()}
    assert len(blocks) == sum("conv" in name for name, is_low_rank in kinds.items() if is_low_rank)


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_goes_into_the_layer_before(scheme: str, affine: bool) -> None:
    model = nn.Sequential(
        smoothk.LowRankConv2d(3, 8, 3, 3, padding=1, groups=1, bias=affine, scheme=scheme),
        nn.BatchNorm2d(8, affine=affine, eps=0.1),  # far from 0: left out, it shows
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        smoothk.LowRankLinear(8 * 16, 6, 2, bias=affine),
        nn.BatchNorm1d(6, affine=affine, eps=0.1),
        nn.ReLU(),
        nn.Linear(6, 4),
        nn.BatchNorm1d(4),
    )
    fast = check(with_statistics(model), torch.randn(5, 3, 6, 6))
    assert count(fast, nn.modules.batchnorm._BatchNorm) == 0
    assert count(fast, nn.ReLU) == 0


class Forms(nn.Module):
    """What stands in the way of folding or fusing."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = smoothk.LowRankConv2d(4, 4, 3, 2, padding=1)
        self.used = smoothk.LowRankConv2d(4, 4, 3, 2, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.scaled = smoothk.LowRankConv2d(4, 4, 3, 2, padding=1)
        self.own = smoothk.LowRankConv2d(4, 4, 3, 2, padding=1)
        self.no_statistics = nn.BatchNorm2d(4, track_running_stats=False)
        self.twins = nn.ModuleList(smoothk.LowRankConv2d(4, 4, 3, 2, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.twice(x)) + self.norms[1](self.twice(x))  # one layer, two norms
        y = self.used(x)
        x = torch.relu(self.norms[2](y) + y)  # a use beside the norm
        x = torch.add(self.scaled(x), x, alpha=2).relu()  # not a plain addition
        y = self.own(x)
        x = (y + y).relu_()  # to itself
        x = self.no_statistics(x)
        x = (self.twins[0](x) + self.twins[1](x)).relu()  # either could finish
        bias = x.mean((2, 3), keepdim=True)
        return (self.twins[0](x) + bias).relu()  # broadcast


def test_what_cannot_be_fused_stays_right() -> None:
    fast = check(with_statistics(Forms()), torch.randn(2, 4, 6, 6))
    assert count(fast, nn.BatchNorm2d) == 4


class Rewriting(nn.Module):
    """What is written in place is read later."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = smoothk.LowRankConv2d(4, 4, 3, 2, padding=1)
        self.dense = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, form: str) -> Tensor:
        x = x * 2
        kept, y = x, self.conv(x)
        if form == "iadd":
            x += y
            return x.relu() + kept
        if form == "add_":
            return x.add_(y).relu() + kept
        if form == "operator":
            x *= 3
        elif form == "method":
            x.mul_(3)
        elif form == "function":
            F.relu(x, True)
        elif form == "module":
            x = self.relu(x)
        return torch.relu(y + self.dense(x)) if form == "module" else F.relu(y) + kept


class Fixed(nn.Module):
    def __init__(self, model: nn.Module, *arguments: object) -> None:
        super().__init__()
        self.model, self.arguments = model, arguments

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, *self.arguments)


@pytest.mark.parametrize("form", ["iadd", "add_", "operator", "method", "function", "module"])
def test_what_is_written_in_place_is_read_as_before(form: str) -> None:
    check(Fixed(Rewriting(), form), torch.randn(2, 4, 6, 6))


def test_an_augmented_size_keeps_its_other_names() -> None:
    """To torch.fx a size is a proxy, too, and ``m *= 4`` must not change ``n``."""

    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.conv(x))
            n = m = x.shape[0]
            m *= 4
            half = height = x.shape[-2]
            half //= 2
            return x.reshape(m, -1).reshape(n, 4, -1)[:, :, :half] + height

    fast = check(with_statistics(Sizes()), torch.randn(2, 4, 6, 6))
    assert count(fast, nn.BatchNorm2d) == 0
    x = torch.randn(3, 4, 6, 6)
    assert torch.equal(copy.deepcopy(fast)(x), fast(x))


def test_the_usual_in_place_forms_are_fused() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = smoothk.LowRankConv2d(4, 4, 3, 2, padding=1)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.relu(self.conv(x))
            y = self.conv(y)
            y += x
            return self.relu(y)

    assert count(check(Block(), torch.randn(2, 4, 6, 6)), LowRankReLU) == 2


class Shared(nn.Module):
    """One layer in two parts of a model that cannot be traced as a whole."""

    def __init__(self) -> None:
        super().__init__()
        conv = smoothk.LowRankConv2d(4, 4, 3, 2, padding=1)
        self.first, self.second = (nn.Sequential(conv, nn.BatchNorm2d(4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x) if x.mean() > 1e3 else self.first(x) + self.second(x)


def test_a_layer_that_parts_of_the_model_share() -> None:
    assert count(check(with_statistics(Shared()), torch.randn(2, 4, 6, 6)), nn.BatchNorm2d) == 0


class Named(nn.Module):
    """Has names that those of new modules could be taken for, and a number that torch.fx takes for a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = smoothk.LowRankConv2d(4, 4, 3, 2, padding=1)
        self.other = nn.Conv2d(4, 4, 3, padding=1)
        self.conv_relu = nn.ReLU()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv_relu(self.other(self.conv_relu(self.conv(x)))))
        y = (self.conv(y) + x.size(0)).relu()
        return self.norm(self.other(y)) + self.other.weight.sum()


def test_names_and_numbers() -> None:
    check(with_statistics(Named()), torch.randn(2, 4, 6, 6))


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(smoothk.LowRankConv2d(4, 4, 3, 2, padding=1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.body(x)
        return x if mask is None else x * mask


def test_an_argument_that_may_be_none() -> None:
    model, x = with_statistics(Optional()), torch.randn(2, 4, 6, 6)
    fast = check(model, x)
    assert count(fast, LowRankReLU) == 1
    with torch.no_grad():
        torch.testing.assert_close(fast(x, x), model.eval()(x, x), rtol=1e-4, atol=1e-5)


def spectral(layer: nn.Module, name: str = "weight") -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(layer, name)


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(_double)
    return module


def _double(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output * 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: [spectral(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4), nn.ReLU()],
        lambda: [spectral(smoothk.LowRankConv2d(4, 4, 3, 2), "u"), nn.BatchNorm2d(4), nn.ReLU()],
        lambda: [hooked(smoothk.LowRankConv2d(4, 4, 3, 2)), nn.BatchNorm2d(4)],
        lambda: [hooked(smoothk.LowRankConv2d(4, 4, 3, 2)), nn.ReLU()],
        lambda: [smoothk.LowRankConv2d(4, 4, 3, 2), hooked(nn.BatchNorm2d(4)), nn.ReLU()],
        lambda: [smoothk.LowRankConv2d(4, 4, 3, 2), hooked(nn.ReLU())],
        lambda: [nn.Flatten(2), nn.Linear(36, 7), nn.BatchNorm1d(4)],
        lambda: [nn.Flatten(2), smoothk.LowRankLinear(36, 7, 2), nn.BatchNorm1d(4)],
    ],
    ids=[
        "parametrized",
        "parametrized u",
        "hook",
        "hook, ReLU",
        "norm's hook",
        "ReLU's hook",
        "linear",
        "low-rank linear",
    ],
)
def test_layers_that_stay_as_they_are(make: Callable[[], list[nn.Module]]) -> None:
    model = with_statistics(nn.Sequential(*make())).eval()
    assert {type(m) for m in check(model, torch.randn(2, 4, 6, 6)).children()} == {type(m) for m in model}


def test_an_optimised_model_is_not_saved(tmp_path: Path) -> None:
    fast = smoothk.optimize_for_inference(with_statistics(Forms()))
    folded = smoothk.optimize_for_inference(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    rebuild, arguments = folded.__reduce__()  # as pickle does
    for model in (fast, nn.Sequential(copy.deepcopy(fast)), rebuild(*arguments)):
        with pytest.raises(TypeError, match="model must be what optimize_for_inference was given, got what it made"):
            smoothk.save(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
    smoothk.save(nn.Sequential(fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))), tmp_path / "model.safetensors")


def test_an_optimised_model_can_be_tuned_and_optimised_again() -> None:
    model = nn.Sequential(smoothk.LowRankConv2d(4, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU())
    x = torch.randn(2, 4, 6, 6)
    fast = check(with_statistics(model), x)
    assert len(smoothk.tune(fast, x, budget=0.01, verbose=False).rows) == 1
    check(fast, x)


class Branching(nn.Module):
    """Cannot be traced as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(smoothk.LowRankConv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if x.mean() > 1e3:
            x = x * 2
        return self.head(x.mean((2, 3)))


def test_a_model_with_control_flow_is_done_in_parts() -> None:
    fast = check(with_statistics(Branching()), torch.randn(2, 3, 6, 6))
    assert isinstance(fast, Branching)
    assert count(fast, nn.BatchNorm2d) == 0
    assert count(fast, LowRankReLU) == 1


def test_half_precision() -> None:
    model = nn.Sequential(smoothk.LowRankConv2d(3, 8, 3, 3), nn.BatchNorm2d(8), nn.ReLU())
    model = with_statistics(model).eval().bfloat16()
    x = torch.randn(2, 3, 6, 6, dtype=torch.bfloat16)
    with torch.no_grad():
        y, expected = smoothk.optimize_for_inference(model)(x), model(x)
    assert y.dtype == torch.bfloat16
    assert (y - expected).float().norm() < 2e-2 * expected.float().norm()


def test_a_layer_alone_and_what_is_no_module() -> None:
    layer = smoothk.LowRankConv2d(3, 4, 3, 2)
    check(layer, torch.randn(1, 3, 5, 5))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        smoothk.optimize_for_inference([layer])
