"""The CIFAR-10 table: stages that stop and go on, results that belong to their weights, a report from files alone."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smoothk.recipes.compare import Comparison, Row

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

cifar10, cifar10_report = (importlib.import_module(name) for name in ("cifar10", "cifar10_report"))

# Of 4 channels, half as wide, oneDNN overruns memory with AVX2: backward of a strided 1x1 convolution (torch 2.13).
DIGITS = {"data": "digits", "arch": "digits_net", "width": 0.25, "epochs": 2, "lr": 0.1, "threads": 1}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Layers of 8x8 images are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the script on digits, by a short recipe, in an empty directory."""
    monkeypatch.setitem(cifar10.PRESETS, "small", cifar10.Preset("test", DIGITS))
    monkeypatch.setattr(cifar10, "KEEPS", (0.5, 0.3))

    def run(*options: str, budget: float = 600.0) -> int:
        fixed = ["--data-dir", "unused", "--out", str(tmp_path), "--results", str(tmp_path / "results")]
        return cifar10.main([*fixed, "--budget", str(budget), *options])

    return run


def test_stages_stop_in_time_and_go_on(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("--stage", "train:plain:0", budget=0.01) == cifar10.MORE
    assert not (tmp_path / "plain-0" / "model.safetensors").exists()
    assert call("--stage", "train:plain:0") == cifar10.DONE
    assert len(json.loads((tmp_path / "plain-0" / "history.json").read_text())) == 2

    compare = ("--stage", "compare:plain:0", "--methods", "svd", "l1-weights")
    path = tmp_path / "results" / "plain-0.json"
    assert call(*compare, budget=0.01) == cifar10.MORE
    first = Comparison.from_json(path.read_text())
    assert {row.method for row in first.rows} == {"svd"} and [row.keep for row in first.rows] == [0.5, 0.3]
    assert call(*compare) == cifar10.DONE
    both = Comparison.from_json(path.read_text())
    assert both.rows[:2] == first.rows and [row.method for row in both.rows[2:]] == ["l1-weights"] * 2
    for key in ("machine", "versions", "git", "date"):
        assert key in both.provenance
    assert both.recipe["epochs"] == 2 and both.recipe["nuclear"] == 0.0

    before = path.stat().st_mtime_ns
    assert call(*compare) == cifar10.DONE
    assert path.stat().st_mtime_ns == before

    model = tmp_path / "plain-0" / "model.safetensors"  # another network: its numbers are no longer these
    assert call("--stage", "train:plain:1") == cifar10.DONE
    model.write_bytes((tmp_path / "plain-1" / "model.safetensors").read_bytes())
    assert call("--stage", "compare:plain:0", "--methods", "l1-weights") == cifar10.DONE
    again = Comparison.from_json(path.read_text())
    assert {row.method for row in again.rows} == {"l1-weights"}
    assert again.recipe["weights_sha256"] != both.recipe["weights_sha256"]


def test_a_run_by_another_recipe_is_refused(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--stage", "train:plain:0") == cifar10.DONE
    monkeypatch.setitem(cifar10.PRESETS, "small", cifar10.Preset("test", {**DIGITS, "lr": 0.2}))
    assert call("--stage", "compare:plain:0") == cifar10.FAILED
    assert "lr must be 0.2 in preset 'small', got 0.1" in capsys.readouterr().err
    monkeypatch.setitem(cifar10.PRESETS, "small", cifar10.Preset("test", DIGITS))
    assert call("--stage", "compare:plain:0", "--precision", "bf16") == cifar10.FAILED
    assert "precision must be 'bf16' in preset 'small', got 'fp32'" in capsys.readouterr().err
    dose = {"plain": {"weight_decay": 1e-3}}
    monkeypatch.setitem(cifar10.PRESETS, "small", cifar10.Preset("test", DIGITS, dose))
    assert call("--stage", "compare:plain:0") == cifar10.FAILED
    assert "weight_decay must be 0.001 in preset 'small', got 0.0005" in capsys.readouterr().err
    assert not list((tmp_path / "results").iterdir())


@pytest.mark.parametrize("stage", ["compare", "compare:plain", "compare:magic:0", "compare:plain:x", "sing:plain:0"])
def test_stages_that_do_not_exist(call, stage: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        call("--stage", stage)


def test_the_full_network_needs_a_gpu(call, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call("--preset", "full") == cifar10.IMPOSSIBLE == 2
    message = capsys.readouterr().err
    assert "needs a CUDA GPU" in message and message.count("\n") == 1


def test_latency_has_every_side(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "TIMED", ("svd",))
    monkeypatch.setattr(cifar10, "BATCHES", (1,))
    monkeypatch.setattr(cifar10, "IMAGE", (1, 8, 8))
    assert call("--stage", "train:plain:0") == call("--stage", "latency:plain:0", budget=3.0) == cifar10.DONE
    content = json.loads((tmp_path / "results" / "latency" / "plain-0.json").read_text())
    assert {(r["method"], r["keep"]) for r in content["rows"]} == {("dense", 1.0), ("svd", 0.5), ("svd", 0.3)}
    assert all(0 < r["milliseconds"]["p10"] <= r["milliseconds"]["median"] for r in content["rows"])


def made() -> Comparison:
    """Two seeds of the plain network, one of the smooth one; accuracy is 90 less a drop that tells them apart."""
    provenance = {"versions": {"smoothk": "1", "torch": "2"}, "machine": {"cpu": "cpu", "gpu": None}, "date": "day"}
    rows = []
    for network, seed in (("plain", 0), ("plain", 1), ("nuclear", 0)):
        penalty = "none" if network == "plain" else "nuclear 0.0002 (spatial)"
        for method, worse in (("svd", 0.0), ("svd-images", 0.5), ("lamp", 10.0)):
            for keep in (0.3, 0.1):
                drop = worse + seed + (0.2 if network == "nuclear" else 0.0) + 10 * (keep == 0.1)
                ranks = {"layers.0.0.conv1": ["spatial", 3, 12], "fc": ["channel", 2, 10]} if method == "svd" else None
                rows.append(
                    Row(network, penalty, seed, method, keep, 1000, 50, 90.0, round(1000 * keep), 20, 90 - drop,
                        90.5 - drop, 0.1, ranks=ranks)
                )  # fmt: skip
    rows[-1] = replace(rows[-1], parameters=None, macs=None, accuracy=None, accuracy_recalibrated=None)
    return Comparison("test", {"source": "images"}, 5000, {"epochs": 2}, provenance, tuple(rows))


def test_tables_hold_the_means() -> None:
    comparison = made()
    assert cifar10_report.by_method(comparison, "plain").rows[0] == [
        "SVD, global ranks", 2, 90.0, "89.50 / 90.00", "79.50 / 80.00",
    ]  # fmt: skip
    assert cifar10_report.by_method(comparison, "plain").rows[1][0] == "SVD, calibrated †"
    drops = cifar10_report.drops(comparison).rows
    assert drops[0] == ["plain", 30.0, "0.50 ± 0.71", "0.00 ± 0.71", "1.00 ± 0.71"]
    assert drops[-1][2:] == ["10.20", "9.70", "10.70"]
    for method, column in (("svd-bias", "bias-corrected"), ("svd-synthetic", "synthetic inputs")):
        rows = tuple(replace(row, method=method) if row.method == "lamp" else row for row in comparison.rows[:-1])
        table = cifar10_report.drops(replace(comparison, rows=rows))
        assert table.columns[2:] == ["data-free", column, "recalibrated", "calibrated"]
        assert table.rows[0][3] == "10.50 ± 0.71"
        lines = cifar10_report.by_network(replace(comparison, rows=rows)).rows
        assert f"plain, {column}" in [line[0] for line in lines]
    smooth = cifar10_report.on_smooth(comparison).rows
    assert [line[0] for line in smooth] == [
        "LAMP channel pruning, plain", "LAMP channel pruning, nuclear 0.0002 (spatial)",
    ]  # fmt: skip
    assert smooth[1][3:] == ["79.80 / 80.30", "unreachable"]


def test_cost_has_times_where_they_were_taken() -> None:
    rows = [
        {"method": method, "keep": keep, "batch": 1, "milliseconds": {"median": time}}
        for method, keep, time in (("dense", 1.0, 4.0), ("svd", 0.3, 2.0))
    ]
    table = cifar10_report.cost(made(), {"rows": rows})
    assert table.rows[0] == ["dense", 100, 1000, 50, 4.0]
    assert table.rows[1] == ["SVD, global ranks", 30.0, 300, 20, 2.0]
    assert table.rows[2][-1] is None
    assert cifar10_report.cost(made(), None).columns[-1] == "MACs"


def test_figures_and_page_come_from_the_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "cifar10-small"
    directory.mkdir()
    for seed, network in ((0, "plain"), (1, "plain"), (0, "nuclear")):
        rows = tuple(row for row in made().rows if (row.seed, row.network) == (seed, network))
        (directory / f"{network}-{seed}.json").write_text(replace(made(), rows=rows).to_json())
    cifar10_report.draw(directory)
    for name in ("methods_plain", "methods_nuclear", "accuracy", "ranks"):
        head = (directory / f"{name}.png").read_bytes()[:24]
        assert head.startswith(b"\x89PNG") and int.from_bytes(head[16:20], "big") == 1800
    monkeypatch.setattr(cifar10_report, "RESULTS", tmp_path)
    monkeypatch.setattr(cifar10_report, "ROOT", tmp_path)
    page = cifar10_report.page()
    assert "| plain | 30 | 0.50 ± 0.71 |" in page and "methods_nuclear.png" in page and "ranks.png" in page
