"""`smoothk.synthesize_inputs`: inputs with the statistics that batch norm keeps, and what compression gains by them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import smoothk
from smoothk.synthesis import _divergence, _noise

FEW = {"count": 24, "batch_size": 16, "steps": 3}


def network(channels: int = 3) -> nn.Sequential:
    """Untrained, with statistics of smooth images whose channels are alike."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip
    for norm in (model[1], model[4], model[7]):
        nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias, 0, 0.3)
    nn.init.normal_(model[-1].weight, 0, 1)
    return smoothk.recalibrate_batch_norm(model.eval(), images(512, 2).split(128))


def images(count: int, seed: int) -> Tensor:
    coarse = torch.randn(count, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse @ torch.tensor([[1.0, 0.8, 0.5], [0, 0.6, 0.2], [0, 0, 0.8]]) + 0.5, size=12)


def distance(model: nn.Module, small: nn.Module) -> float:
    """Mean divergence of the outputs on images that neither has seen."""
    x = images(500, 3)
    with torch.no_grad():
        logs = [each(x).log_softmax(1) for each in (model, small)]
    return F.kl_div(logs[1], logs[0], reduction="batchmean", log_target=True).item()


def mismatch(model: nn.Module, batch: Tensor) -> float:
    """Mean divergence of what batch norms get from what they keep, from the definition."""
    found: list[Tensor] = []

    def hook(norm: _BatchNorm, args: tuple) -> None:
        rows = args[0].double().movedim(1, 0).flatten(1)
        seen = Normal(rows.mean(1), (rows.var(1, correction=0) + norm.eps).sqrt())
        kept = Normal(norm.running_mean.double(), (norm.running_var.double() + norm.eps).sqrt())
        found.append(kl_divergence(seen, kept).mean())

    handles = [m.register_forward_pre_hook(hook) for m in model.modules() if isinstance(m, _BatchNorm)]
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    return torch.stack(found).mean().item()


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 6), (7, 5, 4, 3)], ids=str)
def test_the_divergence_is_that_of_normal_distributions(shape: tuple[int, ...]) -> None:
    norm = nn.BatchNorm1d(5, dtype=torch.float64, eps=1e-2).eval()
    norm.running_mean.normal_(), norm.running_var.uniform_(0.1, 3)
    x = 2 * torch.randn(shape, dtype=torch.float64) + 1
    rows = x.movedim(1, 0).flatten(1)
    seen = Normal(rows.mean(1), (rows.var(1, correction=0) + 1e-2).sqrt())
    expected = kl_divergence(seen, Normal(norm.running_mean, (norm.running_var + 1e-2).sqrt())).mean()
    torch.testing.assert_close(_divergence(x, norm.running_mean, norm.running_var, 1e-2), expected)


@pytest.mark.parametrize("shape", [(40, 3, 64), (40, 2, 32, 48), (40, 2, 16, 8, 12)], ids=str)
def test_the_noise_is_pink(shape: tuple[int, ...]) -> None:
    noise = _noise(shape, torch.Generator().manual_seed(0))
    assert noise.shape == shape
    assert noise.std().item() == pytest.approx(1, rel=1e-5)
    spectrum = torch.fft.fftn(noise, dim=list(range(2, len(shape)))).abs().square().mean((0, 1))
    along = spectrum.reshape(spectrum.shape[0], -1)[:, 0]  # of waves along the first of the axes
    torch.testing.assert_close(along[1] / along[4], torch.tensor(16.0), rtol=0.5, atol=0)


@pytest.mark.parametrize("shape", [(2000, 3), (2000, 3, 1, 1)], ids=str)
def test_without_neighbours_the_noise_is_white(shape: tuple[int, ...]) -> None:
    noise = _noise(shape, torch.Generator().manual_seed(0))
    assert noise.shape == shape
    torch.testing.assert_close(torch.cov(noise.reshape(-1, 3).T), torch.eye(3), rtol=0, atol=0.1)


def test_each_batch_norm_gets_the_statistics_that_it_keeps() -> None:
    model = network()
    (batch,) = smoothk.synthesize_inputs(model, (3, 12, 12), 128, steps=100)
    noise = _noise((128, 3, 12, 12), torch.Generator().manual_seed(0))
    assert mismatch(model, batch) < 0.01 * mismatch(model, noise)


@pytest.mark.parametrize("keep", [0.5, 0.3])
def test_compression_comes_closer_than_without_inputs(keep: float) -> None:
    model = network()
    inputs = smoothk.synthesize_inputs(model, (3, 12, 12), 256, steps=60)
    without, plain = (smoothk.compress(model, keep, given).model for given in (inputs, None))
    assert distance(model, without) < 0.3 * distance(model, plain)


def test_the_seed_decides_and_the_model_stays_as_it_is() -> None:
    model = network().train()
    model[4].eval(), model[0].requires_grad_(False)
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    first, again = (smoothk.synthesize_inputs(model, (3, 12, 12), **FEW) for _ in range(2))
    other = smoothk.synthesize_inputs(model, (3, 12, 12), **FEW, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[0], first[1])
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert modes == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model[0].parameters()] == [False]
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(("count", "sizes"), [(24, [12, 12]), (16, [16]), (34, [12, 11, 11]), (2, [2])])
def test_batches_are_about_as_large(count: int, sizes: list[int]) -> None:
    batches = smoothk.synthesize_inputs(network(), (3, 12, 12), count, batch_size=16, steps=1)
    assert [list(batch.shape) for batch in batches] == [[size, 3, 12, 12] for size in sizes]
    assert not any(batch.requires_grad or batch.is_inference() for batch in batches)


def test_no_batch_holds_a_single_input() -> None:
    batches = smoothk.synthesize_inputs(network(), (3, 12, 12), 3, batch_size=2, steps=1)
    assert [len(batch) for batch in batches] == [3]


class Scaled(nn.Module):
    """Writes into its input, calls batch norm by keyword, and an expert with nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.expert = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(input=x.sub_(0.5)) + self.expert(x[:0]).sum()


def test_a_model_may_write_into_its_input_and_call_batch_norm_in_any_way() -> None:
    batches = smoothk.synthesize_inputs(Scaled(), (3,), 200, steps=300)
    x = torch.cat(batches)
    torch.testing.assert_close(x.mean(0), torch.full((3,), 0.5), rtol=0, atol=0.1)
    torch.testing.assert_close(x.std(0), torch.ones(3), rtol=0, atol=0.1)


def test_the_default_device_does_not_matter() -> None:
    expected = smoothk.synthesize_inputs(network(), (3, 12, 12), **FEW)
    model = network()
    with torch.device("meta"):
        found = smoothk.synthesize_inputs(model, (3, 12, 12), **FEW)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_want_of_memory_is_said_to_be_that() -> None:
    class Large(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        smoothk.synthesize_inputs(Large(3), (3,), **FEW)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "features": (lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)), (6,)),
    "sound": (lambda: nn.Sequential(nn.Conv1d(2, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 3)), (2, 20)),
    "volumes": (lambda: nn.Sequential(nn.Conv3d(2, 8, 3), nn.BatchNorm3d(8), nn.ReLU()), (2, 6, 5, 4)),
    "norm alone": (lambda: nn.BatchNorm2d(3), (3, 4, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_any_number_of_axes_in_the_dtype_of_the_model(name: str, dtype: torch.dtype) -> None:
    make, shape = MODELS[name]
    model = make().to(dtype)
    batches = smoothk.synthesize_inputs(model, shape, **FEW)
    assert [batch.shape[1:] for batch in batches] == [torch.Size(shape)] * 2
    assert all(batch.dtype == dtype and batch.isfinite().all() for batch in batches)


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_the_modes_of_the_caller_do_not_matter(context: Callable) -> None:
    model = network()
    expected = smoothk.synthesize_inputs(model, (3, 12, 12), **FEW)
    with context():
        found = smoothk.synthesize_inputs(model, (3, 12, 12), **FEW)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not any(batch.is_inference() for batch in found)


def diverged() -> nn.Module:
    model = network()
    model[4].running_var[3] = float("nan")
    return model


class Rounded(nn.BatchNorm1d):
    """Has no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().__call__(x)


class Stateless(nn.Module):
    """Has a batch norm, which it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (lambda: "model", {}, TypeError, "model must be a torch.nn.Module, got str"),
        (lambda: nn.Linear(3, 4), {}, ValueError, "model must have batch norm with running statistics, got none"),
        (lambda: nn.BatchNorm1d(3, track_running_stats=False), {}, ValueError, "model must have batch norm with"),
        (lambda: network().to("meta"), {}, ValueError, "model must hold values, got parameters on the meta device"),
        (diverged, {}, ValueError, "4.running_var of the model must be finite, got NaN or Inf"),
        (Stateless, {"shape": (3,)}, ValueError, "model must be differentiable, and call its batch norms"),
        (lambda: Rounded(3), {"shape": (3,)}, ValueError, "model must be differentiable, and call its batch norms"),
        (network, {"shape": (4, 12, 12)}, ValueError, r"shape must be that of one input .*, got \(4, 12, 12\): "),
        (network, {"shape": 12}, TypeError, "shape must be a sequence of ints, got 12"),
        (network, {"shape": (3, 12.0, 12)}, TypeError, "shape must be a sequence of ints"),
        (network, {"shape": ()}, ValueError, r"shape must hold the positive sizes of one input, got \(\)"),
        (network, {"shape": (3, 0, 12)}, ValueError, "shape must hold the positive sizes"),
        (network, {"count": 1}, ValueError, "count must be at least 2, got 1"),
        (network, {"batch_size": 1}, ValueError, "batch_size must be at least 2, got 1"),
        (network, {"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        (network, {"steps": True}, TypeError, "steps must be an int, got bool"),
        (network, {"seed": 1.0}, TypeError, "seed must be an int, got float"),
        (network, {"lr": "fast"}, TypeError, "lr must be a number, got str"),
        (network, {"lr": 0.0}, ValueError, "lr must be a positive number, got 0.0"),
        (network, {"lr": 1e30}, ValueError, "lr must be small enough for finite inputs in torch.float32, got 1e"),
        (network, {"lr": float("nan")}, ValueError, "lr must be a positive number, got nan"),
    ],
)  # fmt: skip
def test_what_does_not_work_is_said(
    model: Callable[[], object], options: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        smoothk.synthesize_inputs(model(), **{"shape": (3, 12, 12), **FEW, **options})
