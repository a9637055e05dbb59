"""The chapter of docs/results.md on the small vision transformer, from the result files of `vit.py` alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cifar10_report import pivot, read_results, setting

from smoothk.recipes.compare import Comparison, Row, mean
from smoothk.recipes.methods import METHODS
from smoothk.report import Table


def by_network(comparison: Comparison) -> Table:
    """A line for each method and network. Without batch norm a size has one accuracy, not two."""
    networks = {row.network: row.label for row in comparison.rows}
    methods = dict.fromkeys(row.method for row in comparison.rows)
    lines = [(f"{METHODS[m].label}, {label}", (m, name)) for m in methods for name, label in networks.items()]
    return pivot(comparison, "method, network", lines, _accuracy)


def _accuracy(rows: Sequence[Row]) -> str:
    return f"{mean(rows, 'accuracy'):.2f}" if rows else ""


def chapter(directory: Path) -> str:
    """The table and what it says."""
    comparison = read_results(directory)
    parts = [
        f"## {comparison.title}",
        f"Test accuracy in %, data-free; no gradient step, and no batch norm to recalibrate. {setting(comparison)}",
        by_network(comparison).to_markdown(),
        summary(comparison),
    ]
    return "\n\n".join(parts) + "\n"


def summary(comparison: Comparison) -> str:
    """From which size the penalty pays, and what it costs."""
    svd = {(row.network, row.keep): row.accuracy for row in comparison.rows if row.method == "svd"}
    dense = {row.network: row.dense_accuracy for row in comparison.rows}
    names = {row.network: row.label for row in comparison.rows}
    mild, strong = "nuclear-mild", "nuclear"
    return (
        f"The nuclear norm pays from 20 % kept downwards: {names[mild]} has {svd[mild, 0.2]:.2f} there against plain's "
        f"{svd['plain', 0.2]:.2f}, at 15 % {svd[mild, 0.15]:.2f} against {svd['plain', 0.15]:.2f}. {names[strong]} "
        f"loses {dense[strong] - svd[strong, 0.15]:.1f} points down to 15 %, but starts "
        f"{dense['plain'] - dense[strong]:.1f} points below plain. It is one seed of a short recipe: on 10,000 test "
        "images such an accuracy has a standard error of half a point, so that the differences at 50 and 30 % between "
        "plain and the milder dose say nothing."
    )
