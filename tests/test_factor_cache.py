"""What low-rank layers keep of their factors and of their last call, and when they forget it."""

from __future__ import annotations

import gc

import pytest
import torch
from conftest import assert_close_rel
from small_layers import expected, layers, with_method
from torch import Tensor, nn

import smoothk
from smoothk import factor_cache, repeated_call
from smoothk.backend import unavailable_reason
from smoothk.layers import _LowRank
from smoothk.repeated_call import RepeatedCall

cpp_missing = unavailable_reason("cpp")
pytestmark = [
    pytest.mark.skipif(cpp_missing is not None, reason=str(cpp_missing)),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),
]


@pytest.mark.parametrize("kind", ["write", "data", "replace", "load", "optimizer", "inference"])
def test_what_is_kept_follows_the_factors(kind: str) -> None:
    def change(layer: _LowRank) -> None:
        with torch.no_grad():
            if kind == "write":
                layer.u.mul_(2)
            elif kind == "data":
                layer.v.data.add_(0.5)
            elif kind == "replace":
                layer.v = nn.Parameter(torch.randn_like(layer.v))
            elif kind == "load":
                layer.load_state_dict({name: torch.randn_like(value) for name, value in layer.state_dict().items()})
        if kind == "optimizer":
            layer.v.grad = torch.ones_like(layer.v)
            torch.optim.SGD([layer.v], lr=0.1).step()
        if kind == "inference":
            with torch.inference_mode():
                layer.v.add_(1)

    for method in ("fused", "merged"):
        for layer, x in layers():
            layer.method = method
            with torch.no_grad():
                layer(x)
                change(layer)
                assert_close_rel(layer(x), expected(layer, x), torch.float32)


@pytest.mark.parametrize("method", ["fused", "pair"])
def test_a_repeated_call_follows_what_is_changed(method: str) -> None:
    """The second call of a layer takes a shorter way."""
    layer = with_method(smoothk.LowRankConv2d(4, 6, 3, 2, padding=1), method)
    x = torch.randn(2, 4, 8, 8)

    def check(x: Tensor) -> None:
        wanted = expected(layer, x)
        for residual, relu in ((None, False), (torch.randn(wanted.shape), True), (torch.randn(6, 1, 1), False)):
            added = wanted if residual is None else wanted + residual.double()
            actual = layer(x, residual, relu)
            assert_close_rel(actual, added.relu() if relu else added, torch.float32)

    with torch.no_grad():
        layer(x)
        first = factor_cache.kept(layer.v, RepeatedCall)
        layer(torch.randn_like(x))
        assert factor_cache.kept(layer.v, RepeatedCall) is first
        check(x)
        check(torch.randn_like(x))
        for name, value in (("stride", (2, 2)), ("padding", (0, 0)), ("dilation", (2, 2))):
            setattr(layer, name, value)
            check(x)
        for other in (x[:1], x[..., :6], x.to(memory_format=torch.channels_last), x[0]):
            check(other)
            check(other)
        layer.bias = nn.Parameter(torch.randn(6))
        check(x)
        layer.method = "merged"
        check(x)
        layer.method = "fused"
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_a_write_while_a_call_is_kept_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = with_method(smoothk.LowRankConv2d(4, 6, 3, 2), "fused"), torch.randn(1, 4, 5, 5)
    arguments = repeated_call.kernel_arguments

    def written_to(*call: object) -> object:
        result = arguments(*call)
        layer.v.mul_(2)  # as by another thread
        return result

    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(repeated_call, "kernel_arguments", written_to)
        layer(x)
    with torch.no_grad():
        assert_close_rel(layer(x), expected(layer, x), torch.float32)


def test_writes_through_data_to_large_factors_are_seen() -> None:
    layer, x = with_method(smoothk.LowRankConv2d(64, 64, 3, 32, padding=1), "fused"), torch.randn(1, 64, 4, 4)
    with torch.no_grad():
        layer(x)
        layer.v.data.copy_(torch.randn_like(layer.v))
        assert_close_rel(layer(x), expected(layer, x), torch.float32)
        layer.u.data.mul_(0.5)
        assert_close_rel(layer(x), expected(layer, x), torch.float32)


def test_factors_are_packed_once_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    packs = []
    pack = torch.ops.smoothk.low_rank_conv_pack
    monkeypatch.setattr(torch.ops.smoothk, "low_rank_conv_pack", lambda *a: packs.append(1) or pack(*a))
    layer, x = with_method(smoothk.LowRankConv2d(4, 6, 3, 2, padding=1), "fused"), torch.randn(3, 4, 5, 5)
    gc.collect()
    before = len(factor_cache._values)
    with torch.no_grad():
        for batch in (1, 2, 3):
            layer(x[:batch])
    assert len(packs) == 1
    assert len(factor_cache._values) == before + 1
    del layer
    gc.collect()
    assert len(factor_cache._values) == before


def test_a_layer_made_in_inference_mode() -> None:
    with torch.inference_mode():
        layer = with_method(smoothk.LowRankConv2d(4, 6, 3, 2), "fused")
        x = torch.randn(1, 4, 5, 5)
        for _ in range(2):
            wanted = smoothk.low_rank_conv2d(x, layer.v, layer.u, layer.bias, method="pair")
            torch.testing.assert_close(layer(x), wanted)
            layer.v.mul_(2)
