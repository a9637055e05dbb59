"""The chapter of docs/results.md on images as networks, from the result files of `implicit.py` alone."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable
from pathlib import Path

from implicit import KEEPS, NARROW, NETWORKS, Fit, by_network, caption, narrower, table

MILD, STRONG = "nuclear 1", "nuclear 2"  # the two doses that the text is about
SMALL = KEEPS[1:]
FLAT = 9.8  # dB of an image that has the mean colour everywhere
Means = dict[str, dict[float, float]]


def read_fits(directory: Path) -> dict[str, list[Fit]]:
    """The fits of each task, networks in the order of `NETWORKS`; narrower ones put together as one network."""
    known = [Fit.from_json(path.read_text()) for path in sorted(directory.glob("*.json"))]
    narrow = {(fit.config.width, fit.config.seed): fit for fit in known if fit.network.startswith("narrow-")}
    order = list(NETWORKS)
    whole = sorted(
        (fit for fit in known if fit.network in NETWORKS),
        key=lambda fit: (order.index(fit.network), fit.config.seed),
    )
    fits = {task: [fit for fit in whole if fit.task == task] for task in ("fit", "double")}
    plain = [fit for fit in fits["fit"] if fit.network == "plain"]
    fits["fit"] += [narrower(fit, lambda width, seed=fit.config.seed: narrow[width, seed]) for fit in plain]
    return fits


def read_bicubic(directory: Path) -> float:
    """PSNR in dB of bicubic enlargement, which is in the figure's data."""
    with (directory / "psnr.csv").open(encoding="utf-8", newline="") as file:
        return next(float(row["PSNR"]) for row in csv.DictReader(file) if row["network"] == "bicubic")


def means(fits: Iterable[Fit]) -> Means:
    """Mean PSNR over seeds by network and share kept."""
    groups = by_network(fits).items()
    return {name: {keep: statistics.fmean(f.rows[keep][1] for f in group) for keep in KEEPS} for name, group in groups}


def chapter(directory: Path) -> str:
    """Both tasks, a table each and what it says, and the figures."""
    fits, bicubic = read_fits(directory), read_bicubic(directory)
    pictures = f"../benchmarks/results/{directory.name}"
    parts = [
        "## Images as networks",
        "A SIREN maps a pixel's position to its colour. Mean and standard deviation over seeds; every dose that was "
        "measured is in the tables, and all of it is one image. The first-order penalty changes little in either task.",
        "### The image it was fitted to",
        caption("fit", fits["fit"]),
        table(fits["fit"]).to_markdown(),
        on_fit(means(fits["fit"])),
        "### Twice the resolution it was fitted to",
        caption("double", fits["double"]),
        table(fits["double"], [("bicubic", bicubic)]).to_markdown(),
        on_double(means(fits["double"]), bicubic),
        f"![PSNR against kept parameters]({pictures}/psnr.png)",
        f"![The image, plain and smooth, before and after compression]({pictures}/pictures.png)",
    ]
    return "\n\n".join(parts) + "\n"


def on_fit(db: Means) -> str:
    """What wins where the image is the one that was fitted, and at which price."""
    dense, plain = {name: values[1.0] for name, values in db.items()}, db["plain"]
    best = {keep: max(values[keep] for name, values in db.items() if name != NARROW) for keep in SMALL}
    narrow = _range(db[NARROW][keep] - best[keep] for keep in SMALL)
    return (
        f"At the same parameters {MILD} is {_range(_gains(db, MILD))} above plain, but its dense network is "
        f"{dense['plain'] - dense[MILD]:.1f} dB below it ({dense[MILD]:.2f} against {dense['plain']:.2f}); from 20 % "
        f"downwards {STRONG} is ahead, with {dense[STRONG]:.2f} dense. The gaps are so wide because SVD destroys the "
        f"plain network: the mean colour everywhere has {FLAT} dB, plain {plain[0.3]:.1f} at 30 % and {plain[0.1]:.1f} "
        f"at 10 %. A narrower network trained at the size beats the best compressed one by {narrow}: who knows the "
        "size beforehand should train that one."
    )


def on_double(db: Means, bicubic: float) -> str:
    """What wins at the resolution that no network has seen, and what beats them all."""
    dense, mild, strong = {name: values[1.0] for name, values in db.items()}, _gains(db, MILD), _gains(db, STRONG)
    return (
        f"Here {MILD} keeps the dense PSNR ({dense[MILD]:.2f} against {dense['plain']:.2f}), has {db[MILD][0.3]:.2f} "
        f"left at 30 % and is {_range(mild)} above plain at the same parameters. The smallest gain is that at 10 %, "
        f"{mild[-1]:.1f} dB, where {STRONG} gains {strong[-1]:.1f} for {dense['plain'] - dense[STRONG]:.1f} dB of "
        f"dense PSNR. Bicubic enlargement of the same pixels ({bicubic:.2f}) beats every network, dense ones included; "
        "narrower networks were not trained for this task."
    )


def _gains(db: Means, network: str) -> list[float]:
    return [db[network][keep] - db["plain"][keep] for keep in SMALL]


def _range(values: Iterable[float]) -> str:
    found = list(values)
    return f"{min(found):.1f} to {max(found):.1f} dB"
