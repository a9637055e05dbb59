"""Means of channels from batch norm's statistics, and the outputs that are corrected by them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_inference import with_statistics
from torch import Tensor, nn

import smoothk
from smoothk.moments import layer_inputs
from smoothk.recipes.models import build

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
    """Two branches behind two batch norms, joined, a ReLU, a convolution."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor], channels: int = 6) -> None:
        super().__init__()
        self.a, self.b, self.conv, self.join = norm(), norm(), nn.Conv2d(channels, 3, 1).double(), join

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.conv(F.relu(self.join(self.a(x), self.b(y))))


def _added(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


@pytest.mark.parametrize(
    ("join", "channels"),
    [(lambda x, y: x + y, 6), (_added, 6), (lambda x, y: torch.add(x, y), 6), (lambda x, y: x.add_(y), 6),
     (lambda x, y: x.mean((2, 3), keepdim=True) + F.adaptive_avg_pool2d(y, 1), 6),
     (lambda x, y: torch.cat([y, x], 1), 12), (lambda x, y: torch.cat((x, y, x), dim=1), 18)],
)  # fmt: skip
def test_means_behind_two_branches(join: Callable, channels: int) -> None:
    model = Joined(join, channels)
    seen = layer_inputs(model)["conv"]
    x, y = normal_input(model.a, 1, 1), normal_input(model.b, 1, 1)
    torch.testing.assert_close(seen.mean, means(F.relu(join(model.a(x), model.b(y)))), atol=0.1, rtol=0)


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
    "alias",
    [nn.Identity(), nn.Dropout(), lambda x: x.view(x.shape[0], -1), lambda x: x[:, :3], lambda x: x.detach(),
     lambda x: x.flatten(1)],
)  # fmt: skip
def test_what_is_written_under_another_name(alias: Callable[[Tensor], Tensor]) -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.relu, self.conv = norm(), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 1).double()
            self.alias = alias if isinstance(alias, nn.Module) else nn.Identity()
            self.other = nn.Conv2d(6, 6, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            y = self.alias(x)
            self.relu(alias(y))
            return self.conv(x) + self.other(y)

    model = Written().eval()
    seen = layer_inputs(model)
    x = model.norm(normal_input(model.norm, 1, 1))
    for each in seen.values():  # or it is not known
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


class Recording(nn.Module):
    """Keeps what it computed last, counts, draws and makes tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.all = part(), []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.last = self.body(x + torch.rand(1) + torch.tensor([1.0]))
        self.all.append(self.last)
        return self.last


def test_the_model_is_not_changed() -> None:
    model = Recording().train()
    called: list[nn.Module] = []
    model.body.register_forward_hook(lambda module, args, output: called.append(module))
    before = [{**vars(module), "_buffers": copy.deepcopy(module._buffers)} for module in model.modules()]
    random = torch.random.get_rng_state()
    smoothk.correct_bias(model, smoothk.factorize(model, smoothk.plan_ranks(model, 0.9)))
    for module, was in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == was.keys() and module.training
        for key, value in module._buffers.items():
            torch.testing.assert_close(value, was["_buffers"][key], rtol=0, atol=0)
    assert model.all == [] and called == []
    assert torch.equal(torch.random.get_rng_state(), random)


def truncated(model: nn.Module, keep: float = 0.5, **options: str) -> nn.Module:
    return smoothk.factorize(model, smoothk.plan_ranks(model, keep, **options))


CHAINS: dict[str, Callable[[bool], nn.Module]] = {
    "conv2d": lambda bias: nn.Sequential(norm(16), nn.ReLU(), nn.Conv2d(16, 12, 3, bias=bias).double(), norm(12)),
    "groups": lambda bias: nn.Sequential(
        norm(16), nn.ReLU(), nn.Conv2d(16, 12, 3, groups=2, bias=bias).double(), norm(12)
    ),
    "conv1d": lambda bias: nn.Sequential(
        norm(16, nn.BatchNorm1d), nn.ReLU(), nn.Conv1d(16, 12, 3, bias=bias).double(), norm(12, nn.BatchNorm1d)
    ),
    "conv3d": lambda bias: nn.Sequential(
        norm(8, nn.BatchNorm3d), nn.ReLU(), nn.Conv3d(8, 12, 2, bias=bias).double(), norm(12, nn.BatchNorm3d)
    ),
    "linear": lambda bias: nn.Sequential(
        norm(16, nn.BatchNorm1d), nn.Flatten(), nn.Linear(16, 12, bias=bias).double(), norm(12, nn.BatchNorm1d)
    ),
}
SIZES = {"conv2d": (3, 3), "groups": (3, 3), "conv1d": (3,), "conv3d": (2, 2, 2), "linear": ()}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_the_mean_output_is_that_of_the_dense_model(name: str, bias: bool) -> None:
    model = CHAINS[name](bias).eval()
    small = truncated(model)
    assert isinstance(small[2], smoothk.layers._LowRank)
    x = normal_input(model[0], *SIZES[name])
    wanted, before = means(model(x)), means(small(x))
    dense = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(small.state_dict())
    assert smoothk.correct_bias(model, small) is small
    assert (means(small(x)) - wanted).norm() < 0.05 * (before - wanted).norm()
    changed = {key for key, value in small.state_dict().items() if not torch.equal(value, state[key])}
    assert changed == {"2.bias" if bias else "3.running_mean"}
    assert all(torch.equal(value, dense[key]) for key, value in model.state_dict().items())
    once = copy.deepcopy(small.state_dict())
    smoothk.correct_bias(model, small)
    assert all(torch.equal(value, once[key]) for key, value in small.state_dict().items())


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_residual_networks(scheme: str) -> None:
    model = with_statistics(build("resnet18", num_classes=10, width=0.25)).train()
    small = truncated(model, 0.2, scheme=scheme)
    state = copy.deepcopy(small.state_dict())
    smoothk.correct_bias(model, small)
    changed = {key for key, value in small.state_dict().items() if not torch.equal(value, state[key])}
    low_rank = {name for name, layer in small.named_modules() if isinstance(layer, smoothk.layers._LowRank)}
    behind = {name.replace("conv", "bn").replace("shortcut.0", "shortcut.1") + ".running_mean" for name in low_rank}
    assert changed == behind - {"bn1.running_mean", "fc.running_mean"} | ({"fc.bias"} if "fc" in low_rank else set())
    assert len(changed) > 5 and all(module.training for module in small.modules())


def test_nothing_changes_at_full_rank() -> None:
    model = CHAINS["conv2d"](False)
    small = copy.deepcopy(model)
    small[2] = smoothk.LowRankConv2d.from_conv(model[2], rank=12)
    smoothk.correct_bias(model, small)
    torch.testing.assert_close(small[3].running_mean, model[3].running_mean, rtol=1e-12, atol=1e-12)


def test_half_precision_and_inference_mode() -> None:
    model = CHAINS["conv2d"](True).bfloat16()
    with torch.inference_mode():
        small = smoothk.correct_bias(model, truncated(model))
    assert small[2].bias.dtype is torch.bfloat16 and not small[2].bias.is_inference()
    assert not torch.equal(small[2].bias, model[2].bias)


def test_tensors_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = CHAINS["conv2d"](False)
        small = copy.deepcopy(truncated(model))
    assert small[3].running_mean.is_inference()
    smoothk.correct_bias(model, small)
    assert not torch.equal(small[3].running_mean, model[3].running_mean)


def test_an_output_that_others_take_too() -> None:
    """A batch norm's mean can only stand for a layer's bias where nothing else takes that layer's output."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.conv, self.b = norm(16), nn.Conv2d(16, 16, 3, bias=False).double(), norm(16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(F.relu(self.a(x)))
            return self.b(y) + y

    model = Two()
    small = truncated(model)
    state = copy.deepcopy(small.state_dict())
    smoothk.correct_bias(model, small)
    assert all(torch.equal(value, state[key]) for key, value in small.state_dict().items())


def test_compress_corrects_where_it_is_asked_to() -> None:
    model = with_statistics(build("resnet20", num_classes=10))
    plain = smoothk.compress(model, 0.3)
    corrected = smoothk.compress(model, 0.3, bias_correction=True).model
    expected = smoothk.correct_bias(model, smoothk.factorize(model, plain.plan))
    for key, value in corrected.state_dict().items():
        assert torch.equal(value, expected.state_dict()[key]), key
    for key, value in plain.model.named_buffers():  # nothing else is done without
        assert torch.equal(value, model.get_buffer(key)), key


def test_errors() -> None:
    model = CHAINS["conv2d"](False)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        smoothk.correct_bias(1, model)
    with pytest.raises(TypeError, match="small must be a torch.nn.Module, got str"):
        smoothk.correct_bias(model, "small")
    with pytest.raises(ValueError, match="small must be made from model, but its '2' does not fit"):
        smoothk.correct_bias(model, nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="small must be made from model, but it has no low-rank layer"):
        smoothk.correct_bias(truncated(model), model)
    for bias in (False, True):
        dense = CHAINS["conv2d"](bias)
        with pytest.raises(ValueError, match="its '2' does not fit"):  # the batch norm behind it was folded away
            smoothk.correct_bias(dense, smoothk.optimize_for_inference(truncated(dense)))
    model = nn.Sequential(*model, nn.ReLU(), nn.Conv2d(12, 16, 3).double())
    small, other = truncated(model), copy.deepcopy(model)
    other[5] = nn.Conv2d(12, 20, 3).double()
    before = small[3].running_mean.clone()
    with pytest.raises(ValueError, match="its '5' does not fit"):
        smoothk.correct_bias(other, small)
    assert torch.equal(small[3].running_mean, before)  # although that layer was right
