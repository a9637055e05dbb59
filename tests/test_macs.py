"""Multiply-accumulate counts, by hand and against torch's FLOP counter."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from small_models import MODELS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from smoothk import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLinear
from smoothk.factor_cache import kept
from smoothk.macs import count_calls, count_macs
from smoothk.repeated_call import RepeatedCall


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Linear(5, 7), (3, 5), 3 * 5 * 7),
        (nn.Linear(5, 7), (2, 4, 5), 8 * 5 * 7),
        (nn.Linear(5, 7), (5,), 5 * 7),
        (nn.Conv2d(4, 6, 3), (2, 4, 5, 7), 2 * 3 * 5 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 3), (4, 5, 7), 3 * 5 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, (3, 1), stride=2, padding=1, groups=2), (1, 4, 5, 5), 3 * 4 * 6 * 2 * 3),
        (nn.Conv1d(4, 6, 3, dilation=2), (2, 4, 9), 2 * 5 * 6 * 4 * 3),
        (nn.Conv3d(2, 3, 2), (1, 2, 3, 4, 5), 2 * 3 * 4 * 3 * 2 * 8),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5), 2 * 25 * 4 * 6 * 9),
        (LowRankLinear(5, 7, 2), (3, 5), 3 * 2 * (5 + 7)),
        (LowRankConv1d(4, 6, 3, 2), (2, 4, 9), 2 * 7 * 2 * (12 + 6)),
        (LowRankConv2d(4, 6, 3, 2, stride=2), (1, 4, 7, 7), 9 * 2 * (36 + 6)),
        # Between the two, a spatial pair has the output's height and the input's width.
        (LowRankConv2d(4, 6, 3, 2, stride=2, scheme="spatial"), (1, 4, 7, 9), 2 * (3 * 9 * 4 * 3 + 3 * 4 * 6 * 3)),
        (LowRankConv2d(4, 6, (3, 5), 2, padding="same", groups=2, scheme="spatial"), (2, 4, 7, 9),
         2 * 63 * (4 * 2 * 3 + 6 * 2 * 5)),
        (LowRankConv3d(2, 3, 2, 2), (2, 3, 4, 5), 24 * 2 * (16 + 3)),
    ],
    ids=str,
)  # fmt: skip
def test_one_layer_by_hand(layer: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    assert count_macs(layer, torch.randn(shape)) == expected


@pytest.mark.parametrize("name", [name for name in MODELS if name != "transformer"])  # attention is no layer's work
def test_whole_models_have_half_as_many_macs_as_flops(name: str) -> None:
    model, x = (make() for make in MODELS[name])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    assert 2 * count_macs(model, x) == counter.get_total_flops()


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": (2, 1), "padding": 2}, {"padding": "same", "dilation": 2, "groups": 2},
     {"padding": 1, "padding_mode": "circular"}],
    ids=str,
)  # fmt: skip
def test_low_rank_convolutions_have_half_as_many_macs_as_flops(scheme: str, options: dict) -> None:
    layer, x = LowRankConv2d(4, 6, (3, 2), 2, **options, scheme=scheme), torch.randn(2, 4, 8, 9)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert 2 * count_macs(layer, x) == counter.get_total_flops()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("method", ["auto", "fused"])
def test_flops_of_what_the_kernel_would_have_done(method: str, grad: bool) -> None:
    layer, x = LowRankConv2d(64, 64, 3, 16, padding=1), torch.randn(2, 64, 28, 28)
    layer.method = method
    with torch.set_grad_enabled(grad):
        expected = layer(x)  # the calls after it are repetitions
        with FlopCounterMode(display=False) as counter:
            counted = layer(x)
    assert 2 * count_macs(layer, x) == counter.get_total_flops()
    torch.testing.assert_close(counted, expected)


def test_a_counted_call_is_not_repeated() -> None:
    """What the counter was given in place of the kernel is nothing to keep."""
    layer, x = LowRankConv2d(64, 64, 3, 16, padding=1), torch.randn(2, 64, 28, 28)
    with torch.no_grad():
        layer(x)
        before = kept(layer.v, RepeatedCall)
        with FlopCounterMode(display=False):
            layer(x)
        assert kept(layer.v, RepeatedCall) is before


def test_calls_are_counted_by_layer_and_every_time() -> None:
    make, example = MODELS["residual"]
    calls = count_calls(make(), example())
    assert "idle" not in calls and "again" not in calls
    assert len(calls["shared"].positions) == 4 and len(calls["stem.0"].positions) == 1
    assert calls["shared"].dense == 4 * 2 * 6 * 7 * 12 * 12


@pytest.mark.parametrize(("scheme", "rank"), [("channel", 1), ("channel", 3), ("spatial", 2)])
def test_the_price_of_a_rank_is_what_the_factorised_layer_costs(scheme: str, rank: int) -> None:
    conv, x = nn.Conv2d(4, 6, (3, 5), stride=(1, 2), padding=(0, 2), groups=2), torch.randn(2, 4, 8, 9)
    (calls,) = count_calls(conv, x).values()
    price = rank * calls.per_rank(conv.weight.shape, conv.groups, scheme)
    assert price == count_macs(LowRankConv2d.from_conv(conv, rank, scheme=scheme), x)


class Arguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x) + self.b(input=y)


@pytest.mark.parametrize("wrap", [tuple, list, lambda pair: dict(zip("xy", pair, strict=True))])
def test_tuples_and_dictionaries_of_arguments(wrap: Callable) -> None:
    assert count_macs(Arguments(), wrap((torch.randn(2, 3), torch.randn(2, 5)))) == 2 * 4 * (3 + 5)


def test_the_model_is_as_before_even_after_a_failure() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(4, 2)).train()
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 3, 3)
    assert count_macs(model, x) == 2 * 4 * 27 + 2 * 8
    with pytest.raises(RuntimeError, match="shape"):
        count_macs(model, torch.randn(2, 3, 5, 5))
    assert [m.training for m in model] == [True, True, False, True, True]
    assert not any(module._forward_hooks for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_nothing_is_computed_on_meta() -> None:
    with torch.device("meta"):
        assert count_macs(nn.Conv2d(512, 512, 3, padding=1), torch.empty(64, 512, 56, 56)) == 64 * 56**2 * 512**2 * 9
