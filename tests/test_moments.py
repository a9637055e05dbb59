"""Means of channels from batch norm's statistics."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_inference import with_statistics
from torch import Tensor, nn

from smoothk.moments import layer_inputs

N = 20_000


def normal_input(norm: nn.Module, *sizes: int) -> Tensor:
    """What has the running statistics of ``norm``."""
    x = torch.randn(N, norm.num_features, *sizes, dtype=torch.float64)
    shape = (-1, *(1,) * len(sizes))
    return x * norm.running_var.sqrt().reshape(shape) + norm.running_mean.reshape(shape)


def means(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1).mean(1)


def norm(channels: int = 6, kind: type[nn.Module] = nn.BatchNorm2d, **options: bool) -> nn.Module:
    return with_statistics(kind(channels, **options).double()).eval()


class Functional(nn.Module):
    """Batch norm, a function, a convolution."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.conv, self.function = norm(), nn.Conv2d(6, 5, 1).double(), function

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.function(self.norm(x)))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "F.relu, in place": lambda x: F.relu(x, inplace=True),
    "torch.relu_": torch.relu_,
    "method": lambda x: x.relu(),
    "leaky": lambda x: F.leaky_relu(x, 0.3),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": lambda x: x.tanh_(),
    "twice": lambda x: F.silu(F.hardtanh(x)),
    "pooled": lambda x: F.avg_pool2d(F.relu(x), 1),
    "kept": lambda x: F.relu(x).mean((2, 3), keepdim=True),
    "out": lambda x: torch.sigmoid(x, out=x),
    "no out": lambda x: torch.sigmoid(x, out=None),
    "by keyword": lambda x: F.gelu(input=torch.relu(input=x)),
    "averaged twice": lambda x: x.relu().mean(3, True).mean(dim=2, keepdim=True),
    "the name of what was written": lambda x: (F.relu_(x), x)[1],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_means_behind_a_function(name: str) -> None:
    model = Functional(FUNCTIONS[name])
    seen = layer_inputs(model)["conv"]
    with torch.no_grad():
        expected = means(FUNCTIONS[name](model.norm(normal_input(model.norm, 1, 1))))
    torch.testing.assert_close(seen.mean, expected, atol=0.05, rtol=0)
    assert seen.norm is None


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.ELU(), nn.CELU(), nn.SELU(), nn.GELU(), nn.SiLU(), nn.Mish(),
     nn.Hardswish(), nn.Hardsigmoid(), nn.Hardtanh(), nn.Sigmoid(), nn.Tanh(), nn.Softplus(), nn.ReLU(inplace=True),
     nn.Identity(), nn.Dropout(0.5), nn.AvgPool2d(1), nn.AdaptiveAvgPool2d(1)],
    ids=str,
)  # fmt: skip
def test_means_behind_a_module(activation: nn.Module) -> None:
    model = nn.Sequential(norm(), activation, nn.Conv2d(6, 4, 1).double(), norm(4)).train()
    seen = layer_inputs(model)["2"]
    assert model[1].training
    expected = means(copy.deepcopy(model[:2]).eval()(normal_input(model[0], 1, 1)))
    torch.testing.assert_close(seen.mean, expected, atol=0.05, rtol=0)
    assert seen.norm == "3"


def test_the_mean_behind_a_relu_is_that_of_a_clipped_normal_variable() -> None:
    """Nagel et al. 2019, appendix C: ``γ φ(-β/γ) + β (1 - Φ(-β/γ))``."""
    model = nn.Sequential(nn.BatchNorm2d(3, eps=0.0), nn.ReLU(), nn.Conv2d(3, 3, 1)).double()
    model[0].weight.data = torch.tensor([1.0, 0.3, -2.0], dtype=torch.float64)
    model[0].bias.data = torch.tensor([0.0, -0.6, 1.0], dtype=torch.float64)
    expected = []
    for gamma, beta in ((1.0, 0.0), (0.3, -0.6), (2.0, 1.0)):
        density = math.exp(-((beta / gamma) ** 2) / 2) / math.sqrt(2 * math.pi)
        expected.append(gamma * density + beta * 0.5 * (1 + math.erf(beta / gamma / math.sqrt(2))))
    torch.testing.assert_close(layer_inputs(model)["2"].mean.tolist(), expected, rtol=1e-3, atol=1e-4)


def test_a_channel_that_does_not_vary() -> None:
    """A dead channel has no variance: batch norm's eps makes a constant of it."""
    model = nn.Sequential(nn.BatchNorm2d(1), nn.ReLU(), nn.Conv2d(1, 1, 1))
    model[0].running_var.zero_()
    model[0].bias.data.fill_(0.5)
    assert layer_inputs(model)["2"].mean.tolist() == [0.5]


class Joined(nn.Module):
    """Two branches behind two batch norms, joined, a convolution."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor], channels: int = 6) -> None:
        super().__init__()
        self.a, self.b, self.conv, self.join = norm(), norm(), nn.Conv2d(channels, 3, 1).double(), join

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.conv(self.join(self.a(x), self.b(y)))


def _added(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


@pytest.mark.parametrize(
    ("join", "channels"),
    [(lambda x, y: x + y, 6), (_added, 6), (lambda x, y: torch.add(x, y), 6), (lambda x, y: x.add_(y), 6),
     (lambda x, y: x.relu() + y.sigmoid(), 6), (lambda x, y: F.relu(torch.cat([y, x], 1)), 12),
     (lambda x, y: torch.cat((x, y, x), dim=1).relu(), 18)],
)  # fmt: skip
def test_means_behind_two_branches(join: Callable, channels: int) -> None:
    model = Joined(join, channels)
    seen = layer_inputs(model)["conv"]
    x, y = normal_input(model.a, 1, 1), normal_input(model.b, 1, 1)
    torch.testing.assert_close(seen.mean, means(join(model.a(x), model.b(y))), atol=0.1, rtol=0)


class Classifier(nn.Module):
    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.fc, self.pool = norm(), nn.Linear(6, 3).double(), pool

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(F.relu(self.norm(x))))


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean((2, 3)),
    "mean, by name": lambda x: x.mean(dim=[-2, -1]),
    "torch.mean": lambda x: torch.mean(x, (3, 2)),
    "flatten": lambda x: torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1),
    "flatten, by name": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(start_dim=1),
    "view": lambda x: F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1),
    "reshape": lambda x: F.adaptive_avg_pool2d(x, 1).reshape(x.shape[0], -1),
    "twice": lambda x: x.mean(3).mean(2),
}


@pytest.mark.parametrize(
    ("model", "known"),
    [
        (lambda: [nn.Conv1d(3, 6, 3), norm(6, nn.BatchNorm1d), nn.ReLU(), Averaged(), nn.Linear(6, 2)], True),
        (lambda: [norm(6, nn.BatchNorm1d), nn.ReLU(), Averaged(), nn.Linear(6, 2)], True),
        (lambda: [nn.Linear(3, 6), norm(6, nn.BatchNorm1d), nn.ReLU(), nn.Linear(6, 2)], True),
        (lambda: [norm(6, nn.BatchNorm1d), nn.ReLU(), nn.Conv1d(6, 2, 3)], True),
        (lambda: [norm(6, nn.BatchNorm1d), nn.ReLU(), nn.Linear(6, 2)], False),  # of [N, 6] or of [N, 6, 6]
        (lambda: [nn.Linear(3, 9), norm(6, nn.BatchNorm1d), nn.ReLU(), nn.Linear(6, 2)], False),  # of [N, 6, 9]
    ],
)
def test_axes_of_one_dimension(model: Callable[[], list[nn.Module]], known: bool) -> None:
    layers = model()
    assert (str(len(layers) - 1) in layer_inputs(nn.Sequential(*layers))) == known


class Averaged(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-1)


@pytest.mark.parametrize("name", POOLS)
def test_means_of_a_classifier(name: str) -> None:
    model = Classifier(POOLS[name])
    seen = layer_inputs(model)["fc"]
    expected = means(F.relu(model.norm(normal_input(model.norm, 2, 1))))
    torch.testing.assert_close(seen.mean, expected, atol=0.05, rtol=0)


class OwnAffine(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias.abs(), False, 0.1, self.eps)


def _twice(layer: nn.Module) -> nn.Module:
    return nn.Sequential(norm(), nn.ReLU(), layer, nn.ReLU(), layer)


def _hooked(model: nn.Module, at: int) -> nn.Module:
    model[at].register_forward_hook(lambda module, args, output: 2 * output)
    return model


def _patched(model: nn.Module, at: int) -> nn.Module:
    own = model[at].forward
    model[at].forward = lambda x: 2 * own(x)
    return model


def _chain(*between: nn.Module, last: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(norm(), *between, last or nn.Conv2d(6, 6, 1).double())


UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "the input": lambda: nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU()),
    "max pooling": lambda: _chain(nn.MaxPool2d(2)),
    "a layer without batch norm": lambda: nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1)),
    "statistics without values": lambda: nn.Sequential(nn.BatchNorm2d(6, device="meta"), nn.Conv2d(6, 6, 1)),
    "no running statistics": lambda: nn.Sequential(norm(track_running_stats=False), nn.Conv2d(6, 6, 1).double()),
    "a hooked norm": lambda: _hooked(_chain(nn.ReLU()), 0),
    "a hooked activation": lambda: _hooked(_chain(nn.ReLU()), 1),
    "a softmax": lambda: _chain(nn.Softmax(1)),
    "a function that is not known": lambda: Functional(lambda x: x.abs()),
    "a number added": lambda: Functional(lambda x: x + 1),
    "a product": lambda: Joined(lambda x, y: x * y),
    "along another axis": lambda: Joined(lambda x, y: torch.cat([x, y], 2)),
    "pixels mixed by a linear layer": lambda: _chain(nn.ReLU(), last=nn.Linear(6, 6).double()),
    "mean of channels": lambda: Classifier(lambda x: x.mean((1, 2))),
    "one axis of two": lambda: Classifier(lambda x: x.mean(2)),
    "an affine map of its own": lambda: nn.Sequential(norm(6, OwnAffine), nn.Conv2d(6, 6, 1).double()),
    "an output that is given": lambda: Joined(lambda x, y: torch.add(x, y, out=x)),
    "two outputs that are given": lambda: Joined(lambda x, y: torch.frexp(x, out=(y, y.int()))[0]),
    "a patched norm": lambda: _patched(_chain(nn.ReLU()), 0),
    "a patched activation": lambda: _patched(_chain(nn.ReLU()), 1),
    "a pool that does not average": lambda: _chain(nn.AvgPool2d(2, divisor_override=1)),
    "a function that does not": lambda: Functional(lambda x: F.avg_pool2d(x, 2, divisor_override=1)),
    "by position": lambda: Functional(lambda x: F.avg_pool2d(x, 2, 2, 0, False, True, 1)),
    "a ReLU of averages": lambda: _chain(nn.AvgPool2d(2), nn.ReLU()),
    "a ReLU of means": lambda: Functional(lambda x: F.relu(x.mean((2, 3), keepdim=True))),
    "a ReLU of a sum": lambda: Joined(lambda x, y: F.relu(x + y)),
    "a ReLU of averages beside others": lambda: Joined(lambda x, y: F.relu(torch.cat([F.avg_pool2d(x, 1), y], 1)), 12),
    "mean of all": lambda: Classifier(lambda x: x.mean()),
    "more features than channels": lambda: _chain(nn.Flatten(), last=nn.Linear(24, 6).double()),
    "a layer used twice": lambda: _twice(nn.Conv2d(6, 6, 1).double()),
    "layer norm": lambda: nn.Sequential(nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 6)),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known(name: str) -> None:
    assert layer_inputs(UNKNOWN[name]()) == {}


class NormAct(nn.BatchNorm2d):
    """As timm has it: torch.fx sees what is in it."""

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "images")
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return F.silu(x, inplace=True)


def test_a_batch_norm_of_another_class() -> None:
    first = norm(6, NormAct)
    model = nn.Sequential(first, nn.Conv2d(6, 4, 1).double(), norm(4, NormAct), nn.Conv2d(4, 4, 1).double())
    seen = layer_inputs(model)
    assert {name: each.norm for name, each in seen.items()} == {"1": "2", "3": None}
    torch.testing.assert_close(seen["1"].mean, means(first(normal_input(first, 1, 1))), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("alias", "known"),
    [(nn.Identity(), {"conv", "other"}), (nn.Dropout(), {"conv", "other"}), (lambda x: x.view(x.shape[0], -1), set()),
     (lambda x: x[:, :3], set()), (lambda x: x.detach(), set()), (lambda x: x.flatten(1), set())],
)  # fmt: skip
def test_what_is_written_under_another_name(alias: Callable[[Tensor], Tensor], known: set[str]) -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.relu, self.conv = norm(), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 1).double()
            self.other, self.alias = nn.Conv2d(6, 6, 1).double(), alias

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            y = self.alias(x)
            self.relu(self.alias(y))
            return self.conv(x) + self.other(y)

    model = Written().eval()
    seen = layer_inputs(model)
    x = model.norm(normal_input(model.norm, 1, 1))
    assert seen.keys() == known
    for each in seen.values():
        torch.testing.assert_close(each.mean, means(F.relu(x)), atol=0.05, rtol=0)


class Branching(nn.Module):
    """A model with control flow on values."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            x = part(x) if x.sum() > 0 else x
        return x


def part(conv: nn.Module | None = None, last: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(norm(), nn.ReLU(), conv or nn.Conv2d(6, 6, 1), last or norm())


@pytest.mark.parametrize("train", [False, True])
def test_the_parts_of_a_model_that_cannot_be_traced(train: bool) -> None:
    body = nn.Sequential(nn.Conv2d(3, 6, 1), norm(), nn.ReLU(), nn.Conv2d(6, 6, 1), norm())
    last = NormAct(6)
    last.act = nn.Identity()  # which makes a part of it
    model = Branching(body=body, norm=last).train(train)
    assert {name: seen.norm for name, seen in layer_inputs(model).items()} == {"body.3": "body.4"}
    assert all(module.training == train for module in model.modules())


def test_layers_and_norms_that_parts_share() -> None:
    conv, last = nn.Conv2d(6, 6, 1), norm()
    assert layer_inputs(Branching(a=part(conv), b=part(conv))) == {}
    seen = layer_inputs(Branching(a=part(last=last), b=part(last=last)))
    assert {name: each.norm for name, each in seen.items()} == {"a.2": None, "b.2": None}


def test_a_model_that_normalises_its_output() -> None:
    """`F.normalize` passes ``out=None`` on."""
    assert layer_inputs(Classifier(lambda x: F.normalize(x).mean((2, 3)))) == {}
    assert layer_inputs(Classifier(lambda x: (F.normalize(x), x.mean((2, 3)))[1])).keys() == {"fc"}


def test_a_default_device_is_no_matter() -> None:
    model = _chain(nn.ReLU())
    with torch.device("meta"):
        assert layer_inputs(model)["2"].mean.device.type == "cpu"


def test_compiled_parts_are_looked_into() -> None:
    model = nn.Sequential(nn.Identity(), torch.compile(part(), backend="eager"))
    assert layer_inputs(model).keys() == {"1._orig_mod.2"}
