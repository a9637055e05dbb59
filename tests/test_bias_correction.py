"""Mean outputs of low-rank layers, corrected by what batch norm knows."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_inference import with_statistics
from test_moments import means, norm, normal_input, part
from torch import Tensor, nn

import smoothk
from smoothk.recipes.models import build


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
    # Behind one batch norm and its ReLU: the second ones of the blocks, and the first one, whose input is the stem's.
    within = {name for name in low_rank if name.endswith("conv2") or name == "layers.0.0.conv1"}
    assert changed == {name.replace("conv", "bn") + ".running_mean" for name in within}
    assert len(changed) > 3 and all(module.training for module in small.modules())


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
    other[5] = nn.Conv2d(12, 16, 3, bias=False).double()
    before = small[3].running_mean.clone()
    with pytest.raises(ValueError, match="its '5' does not fit"):
        smoothk.correct_bias(other, small)
    assert torch.equal(small[3].running_mean, before)  # although that layer was right


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda dense: dense[0], r"its '2' has a weight of shape \[12, 16, 3, 3\], and that of model none"),
        (lambda dense: nn.Sequential(*dense[:2], nn.Conv2d(16, 9, 3)), r".* and that of model \[9, 16, 3, 3\]"),
        (lambda dense: nn.Sequential(nn.ReLU(), *dense), "its '2' has a weight of shape .*, and that of model none"),
    ],
)
def test_models_that_do_not_belong_together(model: Callable[[nn.Module], nn.Module], message: str) -> None:
    dense = CHAINS["conv2d"](False)
    with pytest.raises(ValueError, match=f"small must be made from model, but {message}"):
        smoothk.correct_bias(model(dense), truncated(dense))


def test_a_sequence_of_plain_layers_comes_too_late() -> None:
    dense = nn.Sequential(nn.Linear(30, 30))  # nothing to correct, but who looks at the result does not know that
    with pytest.raises(ValueError, match="its '0' is a FactorPair: correct before smoothk.to_sequential"):
        smoothk.correct_bias(dense, smoothk.to_sequential(truncated(dense)))


def test_autocast_does_not_round_the_correction() -> None:
    model = CHAINS["conv2d"](False).float()
    small = truncated(model)
    expected = smoothk.correct_bias(model, copy.deepcopy(small))[3].running_mean
    with torch.autocast("cpu", dtype=torch.bfloat16):
        smoothk.correct_bias(model, small)
    assert torch.equal(small[3].running_mean, expected)
