"""The demonstration: its files, and a summary that says what the rows say."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smoothk import cli
from smoothk.recipes import demo
from smoothk.recipes.compare import Comparison, Row

FILES = {
    "results.json", "results.csv", "results.md",
    "singular_values.png", "singular_values.csv",
    "accuracy.png", "accuracy.csv",
    "weight_rows.png", "weight_rows.csv",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[demo.DemoResult, Path]:
    out = tmp_path_factory.mktemp("demo") / "new" / "directory"
    return demo.run(out, seeds=1, epochs=1, progress=False), out


def test_every_file_is_written(finished: tuple[demo.DemoResult, Path]) -> None:
    result, out = finished
    assert {path.name for path in out.iterdir()} == FILES
    assert {path.name for path in result.files} <= FILES
    assert Comparison.from_json((out / "results.json").read_text()) == result.comparison
    assert result.summary in (out / "results.md").read_text()
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(demo.NETWORKS) * len(demo.KEEPS) * len(demo.METHODS)
    assert {(row["network"], row["method"]) for row in rows} == {(n, m) for n in demo.NETWORKS for m in demo.METHODS}


def test_budgets_hold_for_every_row(finished: tuple[demo.DemoResult, Path]) -> None:
    for row in finished[0].comparison.rows:
        assert row.parameters <= row.keep * row.parameters_before


def test_results_are_stamped(finished: tuple[demo.DemoResult, Path]) -> None:
    comparison = finished[0].comparison
    assert comparison.provenance["versions"]["torch"] == torch.__version__
    assert comparison.provenance["machine"]["threads"] == 1
    assert comparison.data["source"] == "sklearn.datasets.load_digits"
    assert comparison.recipe["epochs"] == 1


def made(accuracies: dict[tuple[str, str, float], float]) -> Comparison:
    start = Row("", "none", 0, "", 0.0, 1000, 1, 99.0, macs=1, seconds=0.0)
    rows = tuple(
        replace(
            start, network=network, method=method, keep=keep, parameters=round(1000 * keep),
            accuracy=accuracy, accuracy_recalibrated=accuracy + 0.5,
        )
        for (network, method, keep), accuracy in accuracies.items()
    )  # fmt: skip
    return Comparison("", {}, 1, {}, {}, rows)


def test_summary_follows_the_rows() -> None:
    accuracies = {(n, m, k): 20.0 for n in demo.NETWORKS for m in demo.METHODS for k in (0.5, 0.1)}
    accuracies |= {("smooth", "svd", 0.5): 98.5, ("smooth", "svd", 0.1): 98.2, ("plain", "svd", 0.5): 98.1}
    accuracies |= {("plain", "svd", 0.1): 11.1, ("weight decay", "l1-weights", 0.1): 33.3}
    text = demo.summarise(made(accuracies))
    assert "At 10 % kept (100 of 1,000 parameters)" in text
    assert "the smooth network 98.2 % (dense 99.0 %), the plain one 11.1 %" in text
    assert "recalibrated on unlabelled images 98.7, 11.6 and 20.5 %" in text
    assert "10 % of the parameters for smooth, 50 % for plain, none of these sizes for more weight decay" in text
    assert "L1 weight pruning 33.3 % (33.8 %)" in text


def test_a_smooth_network_that_lost_is_said_to_have_lost() -> None:
    accuracies = {(n, m, k): 95.0 for n in demo.NETWORKS for m in demo.METHODS for k in (0.5, 0.1)}
    accuracies |= {("smooth", "svd", k): 12.0 for k in (0.5, 0.1)}
    assert "the smooth network 12.0 % (dense 99.0 %), the plain one 95.0 %" in demo.summarise(made(accuracies))


def test_wrong_arguments_come_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        demo.run(tmp_path / "out", seeds=0)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_table_and_the_summary(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], finished: tuple[demo.DemoResult, Path]
) -> None:
    result, out = finished
    monkeypatch.setattr(demo, "run", lambda *args, **options: result)
    assert cli.main(["demo", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert str(result.comparison.overview()) in text and result.summary in text
    assert cli.main(["demo", "--json"]) == 0
    payload = json.loads(capsys.readouterr().out)
    assert payload["summary"] == result.summary and len(payload["rows"]) == len(result.comparison.rows)


def test_threads_are_given_back_after_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def fail(*args: object, **options: object) -> None:
        seen.append(torch.get_num_threads())
        raise FloatingPointError("loss")

    monkeypatch.setattr(demo, "train", fail)
    with pytest.raises(FloatingPointError):
        demo.run(tmp_path, progress=False)
    assert seen == [1] and torch.get_num_threads() == 2
