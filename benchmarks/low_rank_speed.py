"""Tables and figures of the low-rank entries, and the numbers that they are judged by.

    python benchmarks/low_rank_speed.py [DIR] [--dtype float32] [--device cpu]

prints the targets beside what the results in DIR (default: those of the README) say.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entries import low_rank_conv, low_rank_models
from entries.low_rank_conv import BASELINE, CHANNELS_LAST, LIBRARY, TENSORLY
from speed import Record, _ratio_axis, read, timed

from smoothk.recipes.figures import check_matplotlib, look, styled_figure
from smoothk.report import Table

RESULTS = Path(__file__).resolve().parent / "results" / "speed"
GROUP = ("pass", "batch", "keep", "scheme", "layout")
DRAWN = (*LIBRARY, *(name + CHANNELS_LAST for name in LIBRARY), TENSORLY)
Cases = Sequence[Record]


def compact(case: Record) -> Record:
    """The record of one of very many cases: five digits, and the number of samples in place of the samples."""
    sides = [{**side} for side in case["sides"]]
    for side in sides:
        side.pop("page_faults", None)
        side.pop("resident_growth_bytes", None)
        if "samples_ms" in side:
            side["samples"] = len(side.pop("samples_ms"))
        for name in {"errors", "ms", "ratio"} & side.keys():
            side[name] = {key: float(f"{value:.5g}") for key, value in side[name].items()}
    return {**case, "sides": sides}


def layer_cases(results: Sequence[Record], **wanted: Any) -> Cases:
    """The timed cases of `low_rank_conv` whose options are as ``wanted``, those without smoothk left out."""
    cases = [case for result in results for case in result["cases"] if case["baseline"] == BASELINE and timed(case)]
    return [case for case in cases if all(case["options"][name] == value for name, value in wanted.items())]


def over_smoothk(case: Record, name: str) -> float | None:
    """Time of a side over smoothk's, by its name for NCHW; for the library that of smoothk's layout."""
    layout = case["options"].get("layout", "nchw")
    name += CHANNELS_LAST if layout == "channels_last" and name in LIBRARY else ""
    side = timed(case).get(name)
    return None if side is None else side["ratio"]["median"]


def over_best(case: Record) -> float | None:
    """smoothk's time over the fastest of the library's ways in the same layout; None unless all were timed.

    In inference the dense convolution is the merged one; in training that has the product to compute too.
    """
    ratios = [over_smoothk(case, name) for name in (*LIBRARY, *["smoothk, merged"] * _training(case))]
    return None if None in ratios else 1 / min(ratios)


def _training(case: Record) -> bool:
    return case["options"]["pass"] == "training"


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Over the values there are."""
    logarithms = [math.log(value) for value in values if value is not None]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else None


def mean_over_smoothk(cases: Cases, name: str) -> float | None:
    """Geometric mean over layers of a side's time over smoothk's."""
    return geometric_mean(over_smoothk(case, name) for case in cases)


def worst_layer(cases: Cases) -> tuple[float, str] | None:
    """The largest `over_best`, and which layer has it."""
    found = [(ratio, case["name"]) for case in cases if (ratio := over_best(case)) is not None]
    return max(found, default=None)


def layer_table(results: Sequence[Record]) -> Table:
    """A line for each pass, batch and share kept: geometric means over the layers, and the worst layer."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for case in layer_cases(results):
        groups.setdefault(tuple(case["options"][name] for name in GROUP), []).append(case)
    sides = (*LIBRARY, TENSORLY)
    rows = []
    for (mode, batch, keep, scheme, layout), cases in groups.items():
        words = [mode] + [scheme] * (scheme != "channel") + [layout] * (layout != "nchw")
        means = [mean_over_smoothk(cases, name) for name in sides]
        worst = worst_layer(cases)
        note = "" if worst is None else f"{worst[0]:.2f} ({worst[1].partition(',')[0]})"
        rows.append([", ".join(words), batch, f"{100 * keep:g} %", len(cases), *means, note])
    heads = [f"{name} ÷ smoothk" for name in sides]
    columns = ["pass", "batch", "kept", "layers", *heads, "worst layer: smoothk ÷ best"]
    return Table(columns, rows, dict.fromkeys(heads, ".2f"))


def model_table(results: Sequence[Record]) -> Table:
    """Every side's time over smoothk's, a column for each network, pass and batch, and what is kept of the network."""
    columns = [(result, case) for result in results for case in result["cases"] if timed(case)]
    names = list(dict.fromkeys(name for _, case in columns for name in timed(case)))
    rows: list[list[object]] = [[name, *(_quotient(case, name) for _, case in columns)] for name in names]
    for what in ("macs", "parameters"):
        kept = [f"{100 * case['options'][f'{what}_kept']:.1f} %" for _, case in columns]
        rows.append([f"{'MACs' if what == 'macs' else what} kept", *kept])
    memory = [memory_over_pair(case) for _, case in columns]
    rows.append(["peak memory, smoothk ÷ pair", *("" if m is None else f"{m:.2f}" for m in memory)])
    heads = [f"{result['set']['title']}, {case['name']}" for result, case in columns]
    return Table(["time over smoothk", *heads], rows)


def _quotient(case: Record, name: str) -> str:
    side = timed(case).get(name)
    if side is None:
        return ""
    if name == case["baseline"]:
        return f"1 ({side['ms']['median']:.3g} ms)"
    return f"{side['ratio']['median']:.2f}"


def memory_over_pair(case: Record) -> float | None:
    """Peak memory beyond weights and input, smoothk's over the pair's."""
    sides = timed(case)
    if not {BASELINE, "pair"} <= sides.keys() or not sides["pair"]["peak_extra_bytes"]:
        return None
    return sides[BASELINE]["peak_extra_bytes"] / sides["pair"]["peak_extra_bytes"]


@dataclass(frozen=True)
class Target:
    """A figure to show, read from the results of the layers or of one network."""

    what: str
    must: str
    aim: str
    number: Callable[[Sequence[Record], Mapping[str, Sequence[Record]]], float | None]


def _model(network: str, mode: str, batch: int, number: Callable[[Record], float | None]) -> Callable[..., Any]:
    def find(layers: Sequence[Record], models: Mapping[str, Sequence[Record]]) -> float | None:
        cases = [c for c in models.get(network, []) if (c["options"]["pass"], c["options"]["batch"]) == (mode, batch)]
        return number(cases[0]) if cases and cases[0]["baseline"] == BASELINE else None

    return find


def _over(name: str) -> Callable[[Record], float | None]:
    return lambda case: over_smoothk(case, name)


def _latency(layers: Sequence[Record], number: Callable[[Cases], float | None]) -> float | None:
    return number(layer_cases(layers, **{"pass": "forward"}, batch=1, scheme="channel", layout="nchw"))


def _largest_error(layers: Sequence[Record], _: Any) -> float | None:
    """Of smoothk's sides over all layers; of the output, relative."""
    sides = [side for result in layers for case in result["cases"] for side in case["sides"]]
    ours = [s for s in sides if s["name"].startswith(BASELINE) and s["errors"]]
    return max((side["errors"]["output"] for side in ours), default=None)


def _macs(case: Record) -> float:
    return 100 * case["options"]["macs_kept"]


ALL, MACS = "resnet18_3x3", "resnet18_macs"
TARGETS = [
    Target("3×3 at 28 %, batch 1: dense ÷ smoothk", ">= 2.1", ">= 3", _model(ALL, "forward", 1, _over("dense"))),
    Target("the same at batch 32", ">= 2.4", ">= 3", _model(ALL, "forward", 32, _over("dense"))),
    Target("30 % of MACs: MACs kept, %", "<= 30", "", _model(MACS, "forward", 1, _macs)),
    Target("the same, batch 1: dense ÷ smoothk", ">= 2.0", ">= 2.8", _model(MACS, "forward", 1, _over("dense"))),
    Target("the same, batch 32: dense ÷ smoothk", ">= 2.0", ">= 2.8", _model(MACS, "forward", 32, _over("dense"))),
    Target("the same, batch 1: pair ÷ smoothk", ">= 1.15", ">= 1.5", _model(MACS, "forward", 1, _over("pair"))),
    Target(
        "layers, batch 1: pair ÷ smoothk, geometric mean",
        ">= 1.2",
        ">= 1.6",
        lambda layers, _: _latency(layers, lambda cases: mean_over_smoothk(cases, "pair")),
    ),
    Target(
        "layers, batch 1: dense ÷ smoothk, geometric mean",
        "",
        "",
        lambda layers, _: _latency(layers, lambda cases: mean_over_smoothk(cases, "dense")),
    ),
    Target(
        "worst layer: smoothk ÷ min(dense, pair, merged)",
        "<= 1.10",
        "<= 1.02",
        lambda layers, _: (worst_layer(layer_cases(layers)) or [None])[0],
    ),
    Target("training, batch 32: dense ÷ smoothk", ">= 1.2", ">= 1.8", _model(MACS, "training", 32, _over("dense"))),
    Target("largest error to float64", "<= 1e-5 (bf16: 1e-2)", "", _largest_error),
    Target("peak memory, batch 1: smoothk ÷ pair", "<= 1.0", "0.7", _model(MACS, "forward", 1, memory_over_pair)),
    Target("peak memory, batch 32: smoothk ÷ pair", "<= 1.0", "0.7", _model(MACS, "forward", 32, memory_over_pair)),
]


def targets(out: Path, device: str = "cpu", dtype: str = "float32") -> Table:
    """Every figure to show beside what was measured; empty where it was not."""
    layers = read(out, low_rank_conv.NAME, device, dtype)
    models = {result["set"]["name"]: result["cases"] for result in read(out, low_rank_models.NAME, device, dtype)}
    rows: list[list[object]] = [[t.what, t.must, t.aim, t.number(layers, models)] for t in TARGETS]
    worst = worst_layer(layer_cases(layers))
    if worst is not None:
        rows.append(["worst layer", "", "", worst[1]])
    return Table(["figure", "must", "aim", "measured"], rows)


def draw(out: Path, entry: str, device: str) -> None:
    """Times over smoothk's: of the library's ways layer by layer, or of every side network by network."""
    try:
        check_matplotlib()
    except ImportError as error:
        print(error)
        return
    results = read(out, entry, device)
    panels = (_network_points if entry == low_rank_models.NAME else _layer_points)(results)
    if panels:
        _draw(out / f"{entry}-{device}.png", panels)


Points = list[tuple[str, str, float]]  # row, what the marker stands for, ratio


def _layer_points(results: Sequence[Record]) -> dict[str, Points]:
    """A panel for each share kept, of the pass, batch, scheme and layout that come first."""
    first = next(iter(layer_cases(results)), None)
    panels: dict[str, Points] = {}
    for case in layer_cases(results, **{n: first["options"][n] for n in GROUP if n != "keep"} if first else {}):
        sides, options = timed(case), case["options"]
        points = [(options["layer"], name, sides[name]["ratio"]["median"]) for name in DRAWN if name in sides]
        panels.setdefault(f"{100 * options['keep']:g} % kept", []).extend(points)
    return panels


def _network_points(results: Sequence[Record]) -> dict[str, Points]:
    """A panel for each network, a marker for each pass and batch."""
    panels: dict[str, Points] = {}
    for result in results:
        for case in result["cases"]:
            points = [(name, case["name"], side["ratio"]["median"]) for name, side in timed(case).items()]
            panels.setdefault(result["set"]["title"].replace(", ", "\n", 1), []).extend(points)
    return panels


def _draw(path: Path, panels: Mapping[str, Points]) -> None:
    rows = list(dict.fromkeys(row for points in panels.values() for row, _, _ in points))
    series = list(dict.fromkeys(name for points in panels.values() for _, name, _ in points))
    with styled_figure(path, 1, len(panels), 1.5 + 0.2 * len(rows), sharex=True, sharey=True) as (figure, axes):
        for axis, (title, points) in zip(axes[0], panels.items(), strict=True):
            for index, name in enumerate(series):
                found = [(ratio, rows.index(row)) for row, other, ratio in points if other == name]
                axis.plot([x for x, _ in found], [y for _, y in found], linestyle="none", label=name, **look(index))
            axis.set_title(title)
            _ratio_axis(axis)
        figure.supxlabel("time over smoothk", fontsize=9.5)
        axes[0, 0].set_yticks(range(len(rows)), rows)
        axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(5, len(labels)))


def main(argv: Sequence[str] | None = None) -> None:
    """Print the figures to show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=RESULTS, help="directory of results")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args(argv)
    print(targets(args.out, args.device, args.dtype))


if __name__ == "__main__":
    main()
