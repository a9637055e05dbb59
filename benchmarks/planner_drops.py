"""Points that trained networks lose when they are compressed, with data and without.

    python benchmarks/planner_drops.py RUN [RUN ...] --data-dir DIR [--keeps 0.3 0.2 0.15 0.1 0.05] [--images 5000]

RUN is a directory that `smoothk train` wrote. A run that held out validation images is measured on those, so that
planners can be compared without a look at the test images; any other run on the test images. No gradient step is taken:

- "data-free": `smoothk.plan_ranks` and `smoothk.factorize`, nothing else;
- "bias": the same with `smoothk.correct_bias`, which looks at no data either;
- "+BN": batch norm of that model recalibrated on unlabelled training images;
- "calibrated": `smoothk.compress` with the same images as ``calibration``.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

import smoothk
from smoothk.recipes import data
from smoothk.recipes.compare import measure
from smoothk.recipes.train import load_dataset, load_run
from smoothk.report import Table

KEEPS = (0.3, 0.2, 0.15, 0.1, 0.05)


def drops(
    run: Path, data_dir: str | None, keeps: Sequence[float] = KEEPS, images: int = 5000
) -> tuple[float, dict[float, tuple[float, ...]]]:
    """Dense accuracy of a run in %, and by kept share the points lost: data-free, bias, +BN, calibrated."""
    model, config = load_run(run)
    dataset = load_dataset(replace(config, data_dir=data_dir))
    calibration = data.calibration_batches(dataset, min(images, len(dataset.train_images)))

    def accuracy(network: nn.Module) -> float:
        return measure(network, dataset, config)

    dense = accuracy(model)
    found = {}
    for keep in keeps:
        small = smoothk.compress(model, keep).model
        free = accuracy(small)
        corrected = accuracy(smoothk.correct_bias(model, small))
        recalibrated = accuracy(smoothk.recalibrate_batch_norm(small, calibration))
        calibrated = accuracy(smoothk.compress(model, keep, calibration=calibration).model)
        found[keep] = tuple(dense - each for each in (free, corrected, recalibrated, calibrated))
    return dense, found


def main() -> None:
    """A line for each run and size, and the mean over the runs where there are several."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data-dir")
    parser.add_argument("--keeps", nargs="+", type=float, default=list(KEEPS))
    parser.add_argument("--images", type=int, default=5000, help="unlabelled training images (default: %(default)s)")
    args = parser.parse_args()
    rows: list[list[object]] = []
    for run in args.runs:
        dense, found = drops(run, args.data_dir, args.keeps, args.images)
        rows += [[run.name, dense, 100 * keep, *values] for keep, values in found.items()]
    if len(args.runs) > 1:
        for keep in args.keeps:
            same = [row for row in rows if row[2] == 100 * keep]
            rows.append(["mean", *(statistics.fmean(row[i] for row in same) for i in range(1, 7))])
    columns = ["run", "dense", "kept %", "data-free", "bias", "+BN", "calibrated"]
    print(Table(columns, rows, {**dict.fromkeys(columns[1:], ".2f"), "kept %": "g"}))


if __name__ == "__main__":
    main()
