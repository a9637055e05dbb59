"""The rules by which a method is chosen on the CPU."""

from __future__ import annotations

import pytest
import torch

import smoothk
from smoothk import low_rank_cost
from smoothk.geometry import geometry_of
from smoothk.low_rank_cost import dense_macs, factor_macs, fastest
from smoothk.macs import count_macs

FLOAT = torch.float32


def geometry(
    size: int, c_in: int, c_out: int, rank: int, kernel: int, batch: int = 1, stride: int = 1, spatial: bool = False
):
    v = (rank, c_in, kernel, 1 if spatial else kernel)
    u = (c_out, rank, 1, kernel if spatial else 1)
    return geometry_of(2, (batch, c_in, size, size), v, u, None, stride, kernel // 2, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "method"),
    [
        ({"size": 32, "c_in": 64, "c_out": 64, "rank": 16, "kernel": 3}, "fused"),
        ({"size": 4, "c_in": 512, "c_out": 512, "rank": 129, "kernel": 3}, "fused"),
        ({"size": 16, "c_in": 128, "c_out": 128, "rank": 128, "kernel": 3}, "fused"),  # 1.11 times the dense work
        ({"size": 16, "c_in": 64, "c_out": 512, "rank": 512, "kernel": 3}, "merged"),
        ({"size": 14, "c_in": 256, "c_out": 1024, "rank": 256, "kernel": 1}, "merged"),
        ({"size": 8, "c_in": 256, "c_out": 512, "rank": 85, "kernel": 1, "stride": 2}, "fused"),
    ],
    ids=str,
)
def test_the_choice(arguments: dict, method: str) -> None:
    assert fastest(geometry(**arguments), FLOAT) == method


def test_gradients_and_bfloat16_in_hardware_are_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = geometry(32, 64, 64, 16, 3)
    assert fastest(layer, FLOAT, True) == "pair"
    for there, method in ((True, "pair"), (False, "fused")):
        monkeypatch.setattr(low_rank_cost, "_library_has_bfloat16", lambda there=there: there)
        fastest.cache_clear()
        assert fastest(layer, torch.bfloat16) == method
        assert fastest(layer, torch.float16) == "fused"
    fastest.cache_clear()


@pytest.mark.parametrize("spatial", [False, True])
def test_multiply_adds_are_those_of_a_run(spatial: bool) -> None:
    layer = smoothk.LowRankConv2d(6, 8, 3, 4, stride=2, padding=1, scheme="spatial" if spatial else "channel")
    x = torch.randn(3, 6, 9, 9)
    shape = geometry(9, 6, 8, 4, 3, batch=3, stride=2, spatial=spatial)
    assert factor_macs(shape) == count_macs(layer, x)
    assert dense_macs(shape) == count_macs(layer.to_conv(), x)


def test_what_runs_is_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    if smoothk.backend.unavailable_reason("cpp"):
        pytest.skip("no extension")
    seen = []
    compute = smoothk.low_rank_conv.compute
    monkeypatch.setattr(smoothk.low_rank_conv, "compute", lambda *a: seen.append(a[6]) or compute(*a))
    x, v = torch.randn(1, 8, 8, 8), torch.randn(4, 8, 1, 1)
    with torch.no_grad():
        for rank in (4, 16):
            smoothk.low_rank_conv2d(x, torch.randn(rank, 8, 3, 3), torch.randn(8, rank, 1, 1), padding=1)
        smoothk.low_rank_conv2d(x[..., :4, :4], v, torch.randn(8, 4, 1, 1))
    assert seen == ["fused", "merged", "fused"]
