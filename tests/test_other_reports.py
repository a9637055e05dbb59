"""Chapters of docs/results.md beside the CIFAR-10 networks': their tables, and sentences that the files bear out."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest

from smoothk.recipes import implicit as recipe

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"

pytestmark = pytest.mark.usefixtures("benchmarks_on_path")
module = importlib.import_module


def test_a_table_has_mean_and_deviation_and_puts_narrower_networks_at_their_size() -> None:
    implicit, report = module("implicit"), module("implicit_report")
    fits = report.read_fits(RESULTS / "implicit")
    rows = {row[0]: row[1:] for row in implicit.table(fits["fit"]).rows}
    assert rows["plain"][:3] == [3, "41.71 ± 0.31", "13.85 ± 2.11"]
    files = [json.loads((RESULTS / "implicit" / f"fit-narrow-39-{seed}.json").read_text()) for seed in range(3)]
    narrow = [fit for fit in fits["fit"] if fit.network == implicit.NARROW]
    assert [fit.rows[0.1] for fit in narrow] == [(4917, file["rows"][0]["psnr"]) for file in files]
    one, bicubic = implicit.table(fits["double"][:1], [("bicubic", 25.9)]).rows
    assert one[1:3] == [1, "25.84"] and bicubic[1:4] == [None, "25.90", None]


def test_narrower_networks_are_no_larger_than_what_compression_leaves() -> None:
    implicit, report = module("implicit"), module("implicit_report")
    fits = report.read_fits(RESULTS / "implicit")["fit"]
    plain, narrow = ([fit for fit in fits if fit.network == name][0].rows for name in ("plain", implicit.NARROW))
    assert all(0.95 * plain[keep][0] < narrow[keep][0] <= plain[keep][0] for keep in implicit.KEEPS)


def test_what_is_said_of_images_as_networks_is_so() -> None:
    implicit, report = module("implicit"), module("implicit_report")
    fits = report.read_fits(RESULTS / "implicit")
    fit, double = report.means(fits["fit"]), report.means(fits["double"])
    narrow = fit.pop(implicit.NARROW)
    for keep in report.SMALL:
        assert narrow[keep] > max(values[keep] for values in fit.values())
        assert (max(fit, key=lambda name: fit[name][keep]) == "nuclear 2") == (keep <= 0.2)
        assert all(db[name][keep] > db["plain"][keep] for db in (fit, double) for name in ("nuclear 1", "nuclear 2"))
    assert report.read_bicubic(RESULTS / "implicit") > max(db for one in fits["double"] for _, db in one.rows.values())
    gains = [double["nuclear 1"][keep] - double["plain"][keep] for keep in report.SMALL]
    assert min(gains) == gains[-1]
    text = report.on_fit(report.means(fits["fit"])) + report.on_double(double, 25.99)
    assert re.findall(r"[\d.]+ to [\d.]+ dB", text) == ["4.6 to 16.9 dB", "6.2 to 9.6 dB", "2.4 to 10.9 dB"]


def test_the_mean_colour_has_the_psnr_that_is_said() -> None:
    image = recipe.load_image("china.jpg", 128)
    flat = image.mean(dim=(1, 2), keepdim=True).expand_as(image)
    assert recipe.psnr(flat, image) == pytest.approx(module("implicit_report").FLAT, abs=0.05)


def test_what_is_said_of_the_transformer_is_so(tmp_path: Path) -> None:
    report, cifar10 = module("vit_report"), module("cifar10_report")
    comparison = cifar10.read_results(RESULTS / "vit")
    assert all(row.accuracy == row.accuracy_recalibrated for row in comparison.rows)
    svd = {(row.network, row.keep): row.accuracy for row in comparison.rows if row.method == "svd"}
    for keep in (0.5, 0.3):
        assert abs(svd["plain", keep] - svd["nuclear-mild", keep]) < 0.5
    for keep in (0.2, 0.15):
        assert min(svd["nuclear", keep], svd["nuclear-mild", keep]) > svd["plain", keep]
    assert report.by_network(comparison).rows[0][1:] == [1, 55.19, "54.32", "53.07", "47.09", "29.31"]
    for path in (RESULTS / "vit").glob("*.json"):  # the chapter needs nothing but the files
        shutil.copy(path, tmp_path)
    assert "starts 5.8 points below plain" in report.chapter(tmp_path)


def test_what_is_said_of_crepe_is_so() -> None:
    report = module("crepe_report")
    comparison, latency = report.read(RESULTS / "crepe")
    rows = {(row.method, row.keep): row for row in comparison.rows}
    assert comparison.data["notes"] * report.NO_LOSS < 200  # it is less than two notes
    assert all(rows["svd", keep].drop <= report.NO_LOSS for keep in (0.5, 0.3, 0.2))
    assert rows["svd", 0.15].drop > report.NO_LOSS
    for keep in (0.5, 0.3, 0.2, 0.15):  # the best without data
        others = [row for (method, size), row in rows.items() if size == keep and method != "svd"]
        assert all(rows["svd", keep].accuracy >= row.accuracy for row in others)
    times = {(row["method"], row["keep"], row["batch"]): row["milliseconds"]["median"] for row in latency["rows"]}
    text = report.summary(RESULTS / "crepe")
    assert f"{times['dense', 1.0, 32] / times['svd', 0.2, 32]:.1f} times less time" in text
    assert "compress(model, 0.2)`" in text and "L1 weight pruning, finds 95.2 %" in text
    assert text.endswith("is ahead from 20 % downwards.")
    for keep in (0.2, 0.15, 0.1):
        assert rows["l1-weights", keep].accuracy_recalibrated > rows["svd", keep].accuracy_recalibrated
