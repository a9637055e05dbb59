"""Tables, comparisons and their files, stamps, figures."""

from __future__ import annotations

import csv
import getpass
import io
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import smoothk
from smoothk import svd
from smoothk.recipes import compare, data, figures, methods, models, provenance
from smoothk.recipes.compare import Comparison, Network, Row
from smoothk.recipes.config import TrainConfig
from smoothk.report import Table

ROOT = Path(__file__).resolve().parent.parent


def test_table_in_every_form() -> None:
    table = Table(["name", "count", "share"], [["a|", 12345, 0.5], ["b", None, 33.333]], {"share": ".1f"})
    assert str(table).splitlines() == ["name   count  share", "a|    12,345    0.5", "b              33.3"]
    assert table.to_markdown().splitlines()[1:] == ["| --- | --: | --: |", "| a\\| | 12,345 | 0.5 |", "| b |  | 33.3 |"]
    assert list(csv.reader(io.StringIO(table.to_csv()))) == [
        ["name", "count", "share"],
        ["a|", "12345", "0.5"],
        ["b", "", "33.333"],
    ]
    assert json.loads(table.to_json())[1] == {"name": "b", "count": None, "share": 33.333}


METHODS = [name for name in compare.METHODS if name != "lamp"]  # it takes long and needs a package


@pytest.fixture(autouse=True, scope="module")
def few_synthetic_inputs() -> Iterator[None]:
    """As many as are enough to tell that they are used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smoothk, "synthesize_inputs", partial(smoothk.synthesize_inputs, count=32, steps=2))
        yield


@pytest.fixture(scope="module")
def dataset() -> data.DataSet:
    """Digits with few test images."""
    whole = data.load("digits")
    return replace(whole, test_images=whole.test_images[:64], test_labels=whole.test_labels[:64])


def network(name: str, seed: int = 0, **options: object) -> Network:
    torch.manual_seed(seed)
    config = TrainConfig(width=0.25, seed=seed, **options)
    return Network(name, models.build("digits_net", 10, 1, width=0.25).eval(), config)


@pytest.fixture(scope="module")
def comparison(dataset: data.DataSet) -> Comparison:
    """Untrained networks, two seeds, every method, with one size that only weight pruning reaches."""
    networks = [network("plain", 0), network("plain", 1), network("smooth", 0, nuclear=2e-4, unfolding="spatial")]
    return compare.compare(
        networks, dataset, [0.5, 0.04], METHODS, title="test", calibration_images=100, progress=False
    )


def test_every_network_method_and_size_has_a_row(comparison: Comparison) -> None:
    assert len(comparison.rows) == 3 * 2 * len(METHODS)
    assert {row.penalty for row in comparison.rows} == {"none", "nuclear 0.0002 (spatial)"}
    for row in comparison.rows:
        if row.parameters is None:
            assert "keep must be at least" in row.note and row.accuracy is None
        else:
            assert 0 < row.parameters <= row.keep * row.parameters_before
            assert row.drop == row.dense_accuracy - row.accuracy
    reached = {row.method for row in comparison.rows if row.keep == 0.04 and row.parameters is not None}
    assert "l1-weights" in reached and "svd-uniform" not in reached


def test_rows_count_what_the_compressed_networks_have(comparison: Comparison, dataset: data.DataSet) -> None:
    plain = network("plain", 0)
    row = next(row for row in comparison.rows if (row.method, row.keep, row.seed) == ("svd-uniform", 0.5, 0))
    small = smoothk.compress(plain.model, 0.5, method="uniform", scheme="channel").model
    assert row.parameters == sum(p.numel() for p in small.parameters())
    assert row.accuracy == compare.measure(small, dataset, plain.config)
    smoothk.recalibrate_batch_norm(small, data.calibration_batches(dataset, 100))
    assert row.accuracy_recalibrated == compare.measure(small, dataset, plain.config)


def test_comparing_changes_no_network(dataset: data.DataSet) -> None:
    plain = network("plain")
    before = {name: value.clone() for name, value in plain.model.state_dict().items()}
    compare.compare([plain], dataset, [0.5], METHODS, title="", calibration_images=50, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in plain.model.state_dict().items())


def test_weight_pruning_has_the_macs_of_the_dense_network(comparison: Comparison) -> None:
    rows = [row for row in comparison.rows if row.method == "l1-weights"]
    assert all(row.macs == row.macs_before and "no speed-up" in row.note for row in rows)
    assert all(row.macs < row.macs_before for row in comparison.rows if row.method == "l1-filters" and row.macs)


def test_ranks_are_those_of_the_compressed_network(comparison: Comparison) -> None:
    row = next(row for row in comparison.rows if (row.method, row.keep, row.seed) == ("svd", 0.5, 0))
    small = smoothk.compress(network("plain", 0).model, 0.5)
    assert row.ranks == {
        name: [layer.scheme, layer.rank, svd.full_rank(layer.shape, layer.groups, layer.scheme)]
        for name, layer in small.plan.factorized.items()
    }
    assert all(row.ranks is None for row in comparison.rows if row.method in ("l1-weights", "l1-filters", "folding"))


def test_a_method_is_prepared_once_for_all_sizes(dataset: data.DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def prepare(model: nn.Module, batches: data.CalibrationBatches):
        calls.append(len(list(batches)))
        return lambda keep: smoothk.compress(model, keep).model

    monkeypatch.setitem(compare.METHODS, "once", methods.Method("once", prepare, compare.count_parameters))
    compare.compare([network("a")], dataset, [0.5, 0.3], ["once"], title="", calibration_images=50, progress=False)
    assert calls == [1]


def test_a_missing_package_is_said_before_any_work(dataset: data.DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    method = replace(compare.METHODS["svd"], needs="no_such_package")
    monkeypatch.setitem(compare.METHODS, "lamp", method)
    with pytest.raises(ImportError, match="method 'lamp' needs no-such-package, .*: pip install no-such-package"):
        compare.compare([network("a")], dataset, [0.5], ["svd", "lamp"], title="")


@pytest.mark.parametrize("method", ["svd", "svd-bias", "svd-synthetic", "svd-images"])
def test_methods_are_what_compress_makes(dataset: data.DataSet, method: str) -> None:
    model, batches = network("plain").model, data.calibration_batches(dataset, 100)
    small = methods.METHODS[method].prepare(model, batches)(0.5)
    options = {"bias_correction": True} if method == "svd-bias" else {}
    if method in ("svd-synthetic", "svd-images"):
        inputs = batches if method == "svd-images" else smoothk.synthesize_inputs(model, dataset.test_images.shape[1:])
        options = {"calibration": inputs, "likelihood": "categorical"}
    expected = smoothk.compress(model, 0.5, **options).model.state_dict()
    assert small.state_dict().keys() == expected.keys()
    for name, value in small.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_a_method_that_cannot_begin_is_a_row_with_the_reason(
    dataset: data.DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(model: nn.Module, batches: object) -> None:
        raise ValueError("calibration needs another model")

    monkeypatch.setitem(compare.METHODS, "svd", replace(compare.METHODS["svd"], prepare=prepare))
    result = compare.compare([network("plain")], dataset, [0.5], ["svd"], title="", calibration_images=100)
    assert result.rows[0].accuracy is None and result.rows[0].note == "calibration needs another model"


def test_unknown_methods_are_refused(dataset: data.DataSet) -> None:
    with pytest.raises(ValueError, match="methods must be of svd, .*got \\['magic'\\]"):
        compare.compare([network("plain")], dataset, [0.5], ["magic"], title="")


def test_comparison_survives_json(comparison: Comparison) -> None:
    assert Comparison.from_json(comparison.to_json()) == comparison
    for text in ("[]", "{}", "nonsense", '{"rows": [{"network": 1}]}'):
        with pytest.raises(ValueError, match="text must be the JSON of a Comparison"):
            Comparison.from_json(text)


def test_shared_recipe_leaves_out_what_differs(comparison: Comparison) -> None:
    assert comparison.recipe["width"] == 0.25
    assert not {"nuclear", "seed", "out_dir", "threads"} & set(comparison.recipe)


def row(seed: int, accuracy: float | None, network: str = "plain") -> Row:
    reached = {} if accuracy is None else {"parameters": 10, "macs": 5, "accuracy": accuracy, "seconds": 0.0}
    return Row(
        network, "none", seed, "svd", 0.1, 100, 50, 90.0, accuracy_recalibrated=accuracy and accuracy + 10, **reached
    )


def made(*rows: Row, **changes: object) -> Comparison:
    return Comparison(
        **{"title": "", "data": {}, "calibration_images": 1, "recipe": {}, "provenance": {}, **changes}, rows=rows
    )


def test_tables_average_over_seeds() -> None:
    result = made(row(0, 70.0), row(1, 74.0), row(0, None, "smooth"))
    plain, smooth = result.table().rows
    assert plain[5:9] == [90.0, 72.0, pytest.approx(8**0.5), 18.0]
    assert plain[9:] == [82.0, pytest.approx(8**0.5), 8.0]
    assert smooth[3] == "unreachable"
    assert result.overview().rows[1][2:] == [" 72.00 /  82.00", "unreachable"]
    assert result.rows_table().rows[0][-2:] == [20.0, 10.0]


def test_merging_keeps_what_all_agree_on() -> None:
    first = made(row(0, 70.0), recipe={"lr": 1, "nuclear": 0}, provenance={"date": "a", "git": 1})
    second = made(row(1, 80.0), recipe={"lr": 1, "nuclear": 2}, provenance={"date": "a", "git": 2})
    merged = compare.merge([first, second])
    assert (merged.rows, merged.recipe, merged.provenance) == (first.rows + second.rows, {"lr": 1}, {"date": "a"})
    with pytest.raises(ValueError, match="on the same images"):
        compare.merge([first, replace(second, data={"source": "elsewhere"})])


def test_stamp_says_what_ran_and_nothing_private() -> None:
    stamp = provenance.stamp()
    text = json.dumps(stamp)
    assert stamp["versions"]["torch"] == torch.__version__
    assert stamp["machine"]["threads"] == torch.get_num_threads()
    assert not any(word in text for word in (platform.node(), str(Path.home()), str(ROOT)) if word)
    assert f'"{getpass.getuser()}"' not in text


def test_stamp_has_the_commit_of_a_checkout_only(tmp_path: Path) -> None:
    assert provenance._git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    state = provenance._git_state(tmp_path)
    assert len(state["commit"]) == 40 and state["dirty"] is False
    (tmp_path / "file").write_text("")
    subprocess.run([*git, "add", "file"], check=True)
    assert provenance._git_state(tmp_path)["dirty"] is True


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def png_width(path: Path) -> int:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    return int.from_bytes(head[16:20], "big")


def test_singular_values_figure(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    figures.singular_values({"a": model, "b": model}, tmp_path / "s.png", layers=["0"])
    assert png_width(tmp_path / "s.png") == 1800
    rows = read_csv(tmp_path / "s.csv")
    values = torch.linalg.svdvals(model[0].weight.detach().double())
    expected = (values / values[0]).tolist()
    assert [row["network"] for row in rows] == ["a"] * 3 + ["b"] * 3
    assert [float(row["sigma / largest"]) for row in rows[:3]] == pytest.approx(expected, rel=1e-4)


def test_accuracy_figure(tmp_path: Path, comparison: Comparison) -> None:
    figures.accuracy(comparison, tmp_path / "a.png", methods=["svd", "l1-filters"])
    assert png_width(tmp_path / "a.png") == 1800
    rows = read_csv(tmp_path / "a.csv")
    assert {row["method"] for row in rows} == {"SVD, global ranks", "L1 filter pruning"}
    plain = [r for r in comparison.rows if (r.network, r.method, r.keep) == ("plain", "svd", 0.5)]
    drawn = next(r for r in rows if (r["network"], r["measure"]) == ("plain", "data-free") and float(r["kept %"]) > 10)
    assert float(drawn["accuracy"]) == pytest.approx(sum(r.accuracy for r in plain) / 2)
    assert float(drawn["lowest"]) == pytest.approx(min(r.accuracy for r in plain))


def test_weight_figure(tmp_path: Path) -> None:
    model = models.build("digits_net", 10, 1, width=0.25)
    figures.weight_rows({"a": model}, tmp_path / "w.png", layer="layers.0.0.conv1")
    assert png_width(tmp_path / "w.png") == 1800
    weight = model.layers[0][0].conv1.weight.detach().flatten(1)
    rows = read_csv(tmp_path / "w.csv")
    expected = (weight / weight.square().mean().sqrt())[5, 7].item()
    assert float(rows[5]["column 7"]) == pytest.approx(expected, abs=1e-4)


def test_a_model_without_weights_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model must have a convolution or linear layer to draw"):
        figures.singular_values({"a": nn.ReLU()}, tmp_path / "s.png")
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="figures need matplotlib: pip install matplotlib"):
        figures.weight_rows({"a": nn.Linear(2, 2)}, tmp_path / "w.png")


def test_recipes_import_nothing_heavy() -> None:
    code = (
        "import sys, smoothk.cli, smoothk.recipes.demo\n"
        "print([m for m in ('sklearn', 'matplotlib', 'safetensors', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
