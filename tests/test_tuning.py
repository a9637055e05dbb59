"""`smoothk.tune`: it times every method, keeps the choice in the layer and in the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import smoothk
from smoothk import tuning
from smoothk.backend import unavailable_reason
from smoothk.low_rank_conv import METHODS

FUSED = unavailable_reason("cpp") is None


def model() -> nn.Sequential:
    return nn.Sequential(
        smoothk.LowRankConv2d(3, 8, 3, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        smoothk.LowRankConv2d(8, 8, 3, 4, scheme="spatial"),
        nn.Flatten(),
        smoothk.LowRankLinear(8 * 36, 5, 2),
    )


def test_every_layer_gets_the_fastest_method(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    seconds = {"fused": 3.0, "pair": 1.0, "merged": 2.0}

    def times(layer: nn.Module, inputs: list, budget: float) -> dict[str, float]:
        first = "merged" if isinstance(layer, smoothk.LowRankLinear) else "pair"
        return {**seconds, first: 0.5}

    monkeypatch.setattr(tuning, "_time_methods", times)
    net = model().train()
    table = smoothk.tune(net, torch.randn(2, 3, 8, 8))
    assert [net[i].method for i in (0, 3, 5)] == ["pair", "pair", "merged"]
    assert table.columns == ["layer", "input", "rank", "fused ms", "pair ms", "merged ms", "method"]
    assert table.rows[0] == ["0", "2x3x8x8", 3, 3000.0, 500.0, 2000.0, "pair"]
    assert capsys.readouterr().out == f"{table}\n"
    assert net.training and net[1].num_batches_tracked == 0


def test_real_times_and_a_quiet_call(capsys: pytest.CaptureFixture) -> None:
    net, x = model().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        before = net(x)
        table = smoothk.tune(net, x, budget=0.01, verbose=False)
        torch.testing.assert_close(net(x), before)
    assert capsys.readouterr().out == ""
    for row in table.rows:
        times = dict(zip(METHODS[1:], row[3:6], strict=True))
        assert (times["fused"] is not None) == FUSED
        measured = {method: t for method, t in times.items() if t is not None}
        assert all(t > 0 for t in measured.values())
        assert row[6] == min(measured, key=measured.get)


def test_a_failure_changes_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(layer: nn.Module, inputs: list, budget: float) -> dict[str, float]:
        if isinstance(layer, smoothk.LowRankLinear):
            raise MemoryError
        return {"pair": 1.0}

    monkeypatch.setattr(tuning, "_time_methods", times)
    net = model()
    with pytest.raises(MemoryError):
        smoothk.tune(net, torch.randn(2, 3, 8, 8))
    assert [net[i].method for i in (0, 3, 5)] == ["auto"] * 3


@pytest.mark.skipif(not FUSED, reason="the C++ extension is not built")
def test_every_method_is_timed_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        table = smoothk.tune(model(), torch.randn(2, 3, 8, 8), budget=0.01, verbose=False)
    assert all(time is not None for row in table.rows for time in row[3:6])


def test_a_layer_called_with_several_sizes() -> None:
    conv = smoothk.LowRankConv2d(3, 3, 3, 2, padding=1)
    net = nn.Sequential(conv, nn.MaxPool2d(2), conv, conv)
    table = smoothk.tune(net, torch.randn(1, 3, 8, 8), budget=0.01, verbose=False)
    assert [row[:2] for row in table.rows] == [["0", "1x3x8x8 1x3x4x4"]]


def test_the_choice_is_in_the_file(tmp_path: Path) -> None:
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    small = smoothk.factorize(dense, smoothk.plan_ranks(dense, 0.5, method="uniform"))
    names = [name for name, m in small.named_modules() if isinstance(m, smoothk.LowRankConv2d)]
    small.get_submodule(names[0]).method = "merged"
    path = tmp_path / "small.safetensors"
    smoothk.save(small, path)
    loaded = smoothk.load(dense, path)
    assert [loaded.get_submodule(name).method for name in names] == ["merged", *["auto"] * (len(names) - 1)]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"0": "fastest"}, "method must be one of"),
        ({"nowhere": "pair"}, "not low-rank"),
        (["0"], "damaged"),
        ({"0": ["pair"]}, "method must be one of"),
    ],
    ids=str,
)
def test_a_file_with_an_impossible_method(methods: object, message: str, tmp_path: Path) -> None:
    from smoothk import checkpoint

    dense = nn.Sequential(nn.Conv2d(3, 8, 3))
    small = nn.Sequential(smoothk.LowRankConv2d.from_conv(dense[0], 2))
    path = tmp_path / "small.safetensors"
    smoothk.save(small, path)
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["smoothk"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header["methods"] = methods
    header["sha256"] = checkpoint._digest(header, tensors)
    safetensors.torch.save_file(tensors, path, {"smoothk": json.dumps(header)})
    with pytest.raises(smoothk.CheckpointError, match=message):
        smoothk.load(dense, path)


def test_bad_arguments() -> None:
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        smoothk.tune("model", x)
    with pytest.raises(ValueError, match="budget must be positive, got 0"):
        smoothk.tune(model(), x, budget=0)
    with pytest.raises(ValueError, match="model must have a low-rank layer that the example input reaches, got none"):
        smoothk.tune(nn.Sequential(nn.Conv2d(3, 3, 3)), x)
