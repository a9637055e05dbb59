"""Tables and figures of what `bench.py` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import COPY, SKIPPED, TIMED

from smoothk.recipes.figures import check_matplotlib, look, styled_figure
from smoothk.report import Table

Record = Mapping[str, Any]
ERRORS = ("value", "gradient")


def read(out: Path, entry: str, device: str, dtype: str = "float32") -> list[Record]:
    """The results of one entry, the smallest weight set first."""
    found = [json.loads(path.read_text()) for path in out.glob(f"{entry}-*-{device}*.json")]
    return sorted((r for r in found if r["dtype"] == dtype), key=lambda r: r["set"]["parameters"])


def case_table(case: Record) -> Table:
    """Every side of a case, for the terminal."""
    ratio = f"÷ {case['baseline']}" if case["baseline"] else "ratio"
    cuda = any("copy_fraction" in side for side in case["sides"])
    last = "% of copy" if cuda else "page faults"
    errors = list(dict.fromkeys(name for side in case["sides"] for name in side["errors"]))
    rows = []
    for side in case["sides"]:
        values: list[object] = [None] * 6
        if side["status"] == TIMED:
            quotient = side.get("ratio", {})
            values = [side["ms"]["median"], *(quotient.get(name) for name in ("median", "p10", "p90"))]
            values += [side["peak_extra_bytes"] / 2**20]
            values += [100 * side["copy_fraction"] if cuda else side["page_faults"]["median"]]
        rows.append([side["name"], *values, *(side["errors"].get(name) for name in errors), _note(side)])
    formats = {"ms": ".3f", ratio: ".3f", "p10": ".3f", "p90": ".3f", "extra MiB": ".2f", last: ".0f"}
    formats |= {f"{name} error": ".1e" for name in errors}
    columns = ["side", "ms", ratio, "p10", "p90", "extra MiB", last, *(f"{name} error" for name in errors), ""]
    return Table(columns, rows, formats)


def _note(side: Record) -> str:
    if side["status"] == SKIPPED:
        return f"skipped: {side['reason']}"
    if side["reason"]:
        return f"RED: {side['reason']}"
    if "reruns" in side:
        return f"{side['reruns']['identical']} of {side['reruns']['count']} reruns identical"
    return ""


def timed(case: Record) -> dict[str, Record]:
    """The sides of a case that have a ratio, by name."""
    return {side["name"]: side for side in case["sides"] if "ratio" in side and side["name"] != COPY}


def difference_table(results: Sequence[Record]) -> Table:
    """Every side's time over the fused one's, a column for each weight set and case."""
    columns = [(result, case) for result in results for case in result["cases"] if timed(case)]
    names = list(dict.fromkeys(name for _, case in columns for name in timed(case)))
    rows = [[name, *(_quotient(case, name) for _, case in columns)] for name in names]
    heads = [f"{result['set']['title']}, {case['name'].partition(',')[0]}" for result, case in columns]
    return Table(["time over fused", *heads], rows)


def _quotient(case: Record, name: str) -> str:
    side = timed(case).get(name)
    if side is None:
        return ""
    ratio = side["ratio"]
    if name == case["baseline"]:
        return f"1 ({side['ms']['median']:.3g} ms)"
    return f"{ratio['median']:.2f} ({ratio['p10']:.2f}–{ratio['p90']:.2f})"


def floor_table(results: Sequence[Record]) -> Table:
    """What a fused penalty has to move, how close to that it comes, and what the sides allocate."""
    rows: list[list[object]] = []
    for result in results:
        for case in result["cases"]:
            sides = timed(case)
            fused, floor = sides["fused"], next(side for name, side in sides.items() if name.startswith("floor"))
            rate = case["bytes"] / fused["ms"]["median"] / 1e6
            extra = [sides[name]["peak_extra_bytes"] / 2**20 for name in ("fused", "foreach", "eager")]
            name = f"{result['set']['title']}, {case['name'].partition(',')[0]}"
            over = 1 / floor["ratio"]["median"]
            rows.append([name, result["set"]["parameters"], case["bytes"] / 1e6, over, rate, *extra])
    memory = [f"{name}: extra MiB" for name in ("fused", "foreach", "eager")]
    formats = {"MB": ".0f", "fused ÷ floor": ".2f", "GB/s": ".1f", **dict.fromkeys(memory, ".1f")}
    return Table(["weights", "parameters", "MB", "fused ÷ floor", "GB/s", *memory], rows, formats)


def files_table(out: Path) -> Table:
    """Every result file of `bench.py`: cases, samples asked for, and of which commit, on which machine, when."""
    rows: list[list[object]] = []
    for path in sorted(out.glob("*.json")):
        result = json.loads(path.read_text())
        if "entry" not in result:
            continue
        stamp = result["provenance"]
        commit = stamp["git"]["commit"][:7] + " and changes" * stamp["git"]["dirty"]
        machine = f"{stamp['machine']['gpu'] or stamp['machine']['cpu']}, {stamp['machine']['threads']} threads"
        rows.append([f"`{path.name}`", len(result["cases"]), result["samples"], commit, machine, stamp["date"]])
    return Table(["file", "cases", "samples", "commit", "machine", "date"], rows)


def nuclear_table(results: Sequence[Record]) -> Table:
    """Methods by time and by their largest errors; the weights are those of the network named in the first column."""
    rows: list[list[object]] = []
    for result in results:
        for case in result["cases"]:
            for name, side in timed(case).items():
                errors = [max(side["errors"][f"{what}{where}"] for where in ("", " on spectra")) for what in ERRORS]
                rows.append([result["set"]["title"], name, _quotient(case, name), *errors])
    formats = {f"{what} error": ".1e" for what in ERRORS}
    return Table(["weights", "method", f"time over {_baseline(results)}", *formats], rows, formats)


def step_table(results: Sequence[Record]) -> Table:
    """What the penalty adds to a training step: the step's time over that without it, and the penalty by itself."""
    rows = []
    for result in results:
        whole, alone = result["cases"][0], result["cases"][-1]
        for name in timed(whole):
            by_itself = timed(alone).get(name, {}).get("ms", {}).get("median")
            rows.append([name, whole["options"]["batch"], _quotient(whole, name), by_itself])
    return Table(
        ["penalty", "batch", "step over step without", "penalty alone, ms"], rows, {"penalty alone, ms": ".2f"}
    )


def provenance(results: Sequence[Record]) -> str:
    """One line: the fewest samples of a side, by which code, and where and when, of each set if that differs."""
    versions = results[0]["provenance"]["versions"]
    cases = [case for each in results for case in each["cases"]]
    samples = min(
        side["samples"] if "samples" in side else len(side["samples_ms"])
        for case in cases
        for side in timed(case).values()
    )
    places: dict[str, list[str]] = {}
    for result in results:
        machine, date = result["provenance"]["machine"], result["provenance"]["date"]
        place = f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, {date}"
        places.setdefault(place, []).append(result["set"]["title"])
    where = [f"{place} ({', '.join(sets)})" if len(places) > 1 else place for place, sets in places.items()]
    return (
        f"At least {samples} samples, {results[0]['dtype']}, smoothk {versions['smoothk']}, torch {versions['torch']}, "
        + "; ".join(where)
    )


def _baseline(results: Sequence[Record]) -> str:
    return next((case["baseline"] for result in results for case in result["cases"] if case["baseline"]), "baseline")


def draw(out: Path, entry: str, device: str) -> None:
    """Ratios to the baseline as a figure, a panel for each case and a marker for each weight set."""
    try:
        check_matplotlib()
    except ImportError as error:
        print(error)
        return
    results = [(result["set"]["title"], case) for result in read(out, entry, device) for case in result["cases"]]
    drawn = [(title, case) for title, case in results if timed(case)]
    panels = list(dict.fromkeys(case["name"] for _, case in drawn))
    if not panels:
        return
    names = list(dict.fromkeys(name for _, case in drawn for name in timed(case)))
    titles = list(dict.fromkeys(title for title, _ in drawn))
    comparable = len({case["baseline"] for _, case in drawn}) == 1
    height = 1.3 + (0.16 + 0.08 * len(titles)) * len(names)
    path = out / f"{entry}-{device}.png"
    with styled_figure(path, 1, len(panels), height, sharex=comparable, sharey=True) as (figure, axes):
        for axis, panel in zip(axes[0], panels, strict=True):
            found = [(title, case) for title, case in drawn if case["name"] == panel]
            for place, (title, case) in enumerate(found):
                shift = 0.22 * (place - (len(found) - 1) / 2)
                _points(axis, timed(case), names, shift, look(titles.index(title)))
            axis.set_title(panel)
            axis.set_xlabel(f"time over {found[0][1]['baseline']}")
            _ratio_axis(axis)
        axes[0, 0].set_yticks(range(len(names)), names)
        axes[0, 0].invert_yaxis()
        handles = [
            axes[0, 0].plot([], [], label=title, linestyle="none", **look(i))[0] for i, title in enumerate(titles)
        ]
        figure.legend(handles, titles, loc="outside upper center", ncols=len(titles))


def _points(
    axis: Any, sides: Mapping[str, Record], names: Sequence[str], shift: float, style: Mapping[str, str]
) -> None:
    """One weight set's markers, with bars from the 10th to the 90th percentile."""
    rows = [names.index(name) + shift for name in sides]
    ratios = [side["ratio"] for side in sides.values()]
    bars = ([r["median"] - r["p10"] for r in ratios], [r["p90"] - r["median"] for r in ratios])
    axis.errorbar([r["median"] for r in ratios], rows, xerr=bars, elinewidth=0.9, linestyle="none", **style)


def _ratio_axis(axis: Any) -> None:
    """Logarithmic, with plain numbers as labels and a line at 1; linear where less than a factor of 2 is shown."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axvline(1, color="#888888", linewidth=0.9)
    axis.tick_params(axis="y", length=0)
    lowest, highest = axis.get_xlim()
    if highest < 2 * lowest:
        return
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if highest > 10 * lowest else (1, 2, 3, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
