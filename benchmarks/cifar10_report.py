"""The CIFAR-10 results as tables, figures and the page docs/results.md, from the result files alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from smoothk.checkpoint import atomic_write
from smoothk.recipes import figures
from smoothk.recipes.compare import Comparison, Row, mean, merge
from smoothk.recipes.methods import METHODS
from smoothk.report import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# What their headings add to the title: the last one was trained by another recipe, and has the derivative penalties.
DIRECTORIES = {"cifar10-full": "", "cifar10-short": "", "cifar10-small": "", "cifar10-batch256": ", batches of 256"}
ORDER = ("plain", "first", "second", "nuclear-mild", "nuclear", "trp")
FIGURES = ("plain", "nuclear")  # have figures of their own
PRUNING = ("l1-weights", "l1-filters", "l2-filters", "lamp", "folding")
PAPER = (30.0, 91.0)  # kept %, accuracy %: arXiv 2505.24469, "up to 91 %", original images, its own dense network
Look = dict[str, Any]
LOOKS: dict[str, Look] = {
    "svd": {"color": "#D55E00", "marker": "o", "linewidth": 2.4, "zorder": 4},
    "svd-bias": {"color": "#D55E00", "marker": "d", "linestyle": ":"},
    "svd-synthetic": {"color": "#D55E00", "marker": "o", "markerfacecolor": "white", "linewidth": 2.4, "zorder": 4},
    "svd-images": {"color": "#D55E00", "marker": "o", "markerfacecolor": "white", "linestyle": "--"},
    "svd-spatial": {"color": "#E69F00", "marker": "s"},
    "svd-energy": {"color": "#56B4E9", "marker": "s", "linestyle": "--"},
    "svd-uniform": {"color": "#56B4E9", "marker": "D", "linestyle": ":"},
    "balf": {"color": "#0072B2", "marker": "^"},
    "l1-weights": {"color": "#000000", "marker": "v"},
    "l1-filters": {"color": "#009E73", "marker": "<", "linestyle": "--"},
    "l2-filters": {"color": "#009E73", "marker": ">", "linestyle": ":"},
    "lamp": {"color": "#009E73", "marker": "P"},
    "folding": {"color": "#CC79A7", "marker": "X"},
}


def read_results(directory: Path) -> Comparison:
    """All result files of a directory as one comparison, networks in the order of `ORDER`."""
    parts = [Comparison.from_json(path.read_text()) for path in sorted(directory.glob("*.json"))]
    return merge(sorted(parts, key=lambda part: (ORDER.index(part.rows[0].network), part.rows[0].seed)))


def by_network(comparison: Comparison) -> Table:
    """SVD with global ranks: lines for each network and what it is calibrated on; a column for each size."""
    networks = {row.network: row.label for row in comparison.rows}
    methods = {"svd": "", "svd-bias": ", bias-corrected", "svd-synthetic": ", synthetic inputs"}
    methods["svd-images"] = ", calibrated"
    lines = [(label + more, (method, name)) for name, label in networks.items() for method, more in methods.items()]
    return pivot(comparison, "network", lines)


def by_method(comparison: Comparison, network: str) -> Table:
    """A line for each method, a column for each size."""
    methods = dict.fromkeys(row.method for row in comparison.rows)
    return pivot(comparison, "method", [(method_label(name), (name, network)) for name in methods])


def method_label(name: str) -> str:
    """A method's name, marked where its first number is not data-free."""
    return METHODS[name].label + " †" * METHODS[name].uses_images


def on_smooth(comparison: Comparison) -> Table:
    """Pruning and folding on the plain network and on smooth ones: does it do better on those, as the paper says?"""
    networks = {row.network: row.label for row in comparison.rows}
    lines = [(f"{METHODS[m].label}, {label}", (m, name)) for m in PRUNING for name, label in networks.items()]
    return pivot(comparison, "method, network", lines)


def _cell(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    if any(row.accuracy is None for row in rows):
        return "unreachable"
    if rows[0].method == "svd-images":  # it has recalibrated batch norm already
        return f"{mean(rows, 'accuracy'):.2f}"
    return f"{mean(rows, 'accuracy'):.2f} / {mean(rows, 'accuracy_recalibrated'):.2f}"


def pivot(
    comparison: Comparison,
    head: str,
    lines: Sequence[tuple[str, tuple[str, str]]],
    cell: Callable[[Sequence[Row]], str] = _cell,
) -> Table:
    """A line for each label and (method, network) of ``lines``; ``cell`` says what the seeds of one size come to."""
    groups = comparison.groups()
    keeps = sorted({row.keep for row in comparison.rows}, reverse=True)
    rows = []
    for label, key in lines:
        found = [groups.get((keep, *key), []) for keep in keeps]
        measured = next((group for group in found if group), None)
        if measured is not None:
            rows.append([label, len(measured), mean(measured, "dense_accuracy"), *map(cell, found)])
    columns = [head, "seeds", "dense", *(f"{100 * keep:g} % kept" for keep in keeps)]
    return Table(columns, rows, {"dense": ".2f"})


DROPS = {  # column: method and field; those that were not measured are left out
    "data-free": ("svd", "drop"),
    "bias-corrected": ("svd-bias", "drop"),
    "synthetic inputs": ("svd-synthetic", "drop"),
    "recalibrated": ("svd", "drop_recalibrated"),
    "calibrated": ("svd-images", "drop"),
}


EXPLAINED = {
    "bias-corrected": "Bias-corrected (`smoothk.correct_bias`): data-free as well.",
    "synthetic inputs": "Synthetic inputs: data-free as well, calibrated on what `smoothk.synthesize_inputs` makes of "
    "batch norm's statistics.",
    "calibrated": "Calibrated: ranks planned and factors refitted on unlabelled images "
    "(`compress(calibration=...)`), no gradient step on weights.",
}


def drops(comparison: Comparison) -> Table:
    """Points below dense of SVD with global ranks, with their spread."""
    groups = comparison.groups()
    columns = _dropped(comparison)
    lines = []
    for name, label in {row.network: row.label for row in comparison.rows}.items():
        for keep in sorted({row.keep for row in comparison.rows}, reverse=True):
            cells = [_spread(groups.get((keep, method, name), []), field) for method, field in columns.values()]
            if any(cells):
                lines.append([label, 100 * keep, *cells])
    return Table(["network", "kept %", *columns], lines, {"kept %": "g"})


def _dropped(comparison: Comparison) -> dict[str, tuple[str, str]]:
    """What of `DROPS` was measured."""
    methods = {row.method for row in comparison.rows}
    return {name: column for name, column in DROPS.items() if column[0] in methods}


def _spread(rows: Sequence[Row], name: str) -> str:
    if not rows or any(getattr(row, name) is None for row in rows):
        return ""
    return spread([getattr(row, name) for row in rows])


def spread(values: Sequence[float]) -> str:
    """Mean and, of several values, sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def cost(comparison: Comparison, latency: dict[str, Any] | None, network: str = "plain") -> Table:
    """Parameters, MACs and, where it was measured, the time of a forward pass, beside each method's accuracy."""
    times = {(r["method"], r["keep"], r["batch"]): r["milliseconds"]["median"] for r in (latency or {}).get("rows", ())}
    batches = sorted({batch for _, _, batch in times})
    columns = ["method", "kept %", "parameters", "MACs", *(f"ms, batch {b}" for b in batches)]
    rows = [row for row in comparison.rows if row.network == network]
    first = rows[0]
    lines: list[list[object]] = [
        ["dense", 100, first.parameters_before, first.macs_before, *(times["dense", 1.0, b] for b in batches)]
    ]
    for (keep, method, name), cell in comparison.groups().items():
        if name == network and all(row.parameters is not None for row in cell):
            measured = [times.get((method, keep, b)) for b in batches]
            counts = [round(mean(cell, "parameters")), round(mean(cell, "macs"))]
            lines.append([METHODS[method].label, 100 * keep, *counts, *measured])
    return Table(columns, lines, {"kept %": "g", **{f"ms, batch {b}": ".2f" for b in batches}})


def caption(comparison: Comparison) -> str:
    """What the numbers are, of which images, and where they were measured."""
    text = (
        f"Test accuracy in %, data-free / after batch norm was recalibrated on {comparison.calibration_images:,} "
        f"unlabelled training images; no gradient step in either. "
    )
    if any(row.method == "svd-images" for row in comparison.rows):
        text += "Calibrated: ranks planned and factors refitted on the same images, one number. "
    if any(row.method == "svd-synthetic" for row in comparison.rows):
        text += "Synthetic inputs: the same on inputs made from batch norm's statistics, with no image. "
    return text + setting(comparison)


def setting(comparison: Comparison) -> str:
    """Which network on which images, measured where."""
    versions, machine = comparison.provenance["versions"], comparison.provenance["machine"]
    first = comparison.rows[0]
    return (
        f"{comparison.title}: {first.parameters_before:,} parameters, {comparison.recipe['epochs']} epochs; images: "
        f"{comparison.data.get('note', comparison.data['source'])}. smoothk {versions['smoothk']}, torch "
        f"{versions['torch']}, {machine['gpu'] or machine['cpu']}, {comparison.provenance.get('date', 'several days')}."
    )


def draw(directory: Path) -> None:
    """Every figure of a directory of result files, and all rows as CSV."""
    comparison = read_results(directory)
    atomic_write(directory / "rows.csv", comparison.rows_table().to_csv().encode())
    for network in FIGURES:
        if any(row.network == network for row in comparison.rows):
            draw_methods(comparison, directory / f"methods_{network}.png", network)
    draw_drops(comparison, directory / "accuracy.png")
    if any(row.ranks for row in comparison.rows):
        draw_ranks(comparison, directory / "ranks.png")


def _points(comparison: Comparison, method: str, network: str, name: str) -> list[tuple[float, float, float, float]]:
    """(kept %, mean, lowest, highest) by size, where the method gets that small."""
    points = []
    for (_, m, n), rows in comparison.groups().items():
        if (m, n) == (method, network) and all(getattr(row, name) is not None for row in rows):
            values = [getattr(row, name) for row in rows]
            kept = 100 * mean(rows, "parameters") / mean(rows, "parameters_before")
            points.append((kept, statistics.fmean(values), min(values), max(values)))
    return sorted(points)


def _line(axis: Any, points: Sequence[tuple[float, float, float, float]], label: str, look: Look) -> None:
    kept, middle, low, high = zip(*points, strict=True)
    axis.plot(kept, middle, label=label, **look)
    axis.fill_between(kept, low, high, color=look["color"], alpha=0.18, linewidth=0)


def _size_axis(axis: Any, comparison: Comparison) -> None:
    keeps = sorted({100 * row.keep for row in comparison.rows})
    axis.set_xscale("log")
    axis.set_xticks(keeps, [f"{keep:g}" for keep in keeps])
    axis.set_xticks([], minor=True)


def draw_methods(comparison: Comparison, path: Path, network: str, near: float = 12.0) -> None:
    """Accuracy against parameters, all methods on one network: the whole range above, what is near dense below."""
    label = next(row.label for row in comparison.rows if row.network == network)
    methods = [name for name in LOOKS if any((row.method, row.network) == (name, network) for row in comparison.rows)]
    dense = mean([row for row in comparison.rows if row.network == network], "dense_accuracy")
    with figures.styled_figure(path, 2, 2, 6.6, sharex=True, sharey="row") as (figure, axes):
        for column, (field, measure) in zip(axes.T, figures.MEASURES.items(), strict=True):
            for axis in column:
                for method in methods:
                    if points := _points(comparison, method, network, field):
                        _line(axis, points, method_label(method), LOOKS[method])
                axis.axhline(dense, color="#888888", label="dense", **figures.DENSE_LINE)
                paper = {"color": "black", "markersize": 11, "linestyle": "none", "zorder": 5}
                axis.plot(*PAPER, "*", label="paper, original images ‡", **paper)
                _size_axis(axis, comparison)
            column[0].set_title(f"{label}: {measure}")
        axes[0, 0].set_ylim(0, 100)
        axes[1, 0].set_ylim(dense - near, dense + 1)
        note = "† looks at unlabelled images in either column   ‡ arXiv 2505.24469: “up to 91 %”, ResNet-18, 30 % kept"
        figure.supxlabel(f"parameters kept (%)\n{note}", fontsize=figures.STYLE["axes.labelsize"] - 1)
        figure.supylabel("test accuracy (%)", fontsize=figures.STYLE["axes.labelsize"])
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)


def draw_drops(comparison: Comparison, path: Path, lowest: float = 8.0) -> None:
    """Points below dense against parameters, SVD with global ranks: a line for each network, seeds as bands."""
    networks = {row.network: row.label for row in comparison.rows}
    panels = _dropped(comparison)
    with figures.styled_figure(path, 1, len(panels), 3.4, sharey=True) as (figure, axes):
        for axis, (title, (method, field)) in zip(axes[0], panels.items(), strict=True):
            for index, (network, label) in enumerate(networks.items()):
                if points := _points(comparison, method, network, field):
                    _line(axis, points, label, figures.look(index))
            axis.axhline(0, color="#888888", **figures.DENSE_LINE)
            axis.set_title(title)
            _size_axis(axis, comparison)
        axes[0, 0].set_ylim(lowest, -0.5)
        axes[0, 0].set_ylabel("points below dense")
        figure.supxlabel("parameters kept (%), SVD with global ranks", fontsize=figures.STYLE["axes.labelsize"])
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)


def draw_ranks(comparison: Comparison, path: Path, method: str = "svd") -> None:
    """Rank of every layer at every size, first seed: the share of full rank as colour, the rank as number."""
    found = [row for row in comparison.rows if row.method == method and row.ranks]
    networks = [name for name in FIGURES if any(row.network == name for row in found)]
    keeps = sorted({row.keep for row in found}, reverse=True)
    layers = list(dict.fromkeys(name for row in found for name in row.ranks))
    layers.sort(key=lambda name: [int(part) if part.isdigit() else part for part in name.split(".")][1:] or [99])
    with figures.styled_figure(path, 1, len(networks), 1.3 + 0.2 * len(layers), sharey=True) as (figure, axes):
        for axis, network in zip(axes[0], networks, strict=True):
            rows = {row.keep: row for row in reversed(found) if row.network == network}
            shares = [[_share(rows[keep].ranks.get(layer)) for keep in keeps] for layer in layers]
            image = axis.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
            for y, layer in enumerate(layers):
                for x, keep in enumerate(keeps):
                    entry = rows[keep].ranks.get(layer)
                    text = f"{entry[1]} {entry[0][0]}" if entry else "dense"
                    colour = "white" if shares[y][x] < 0.5 else "black"
                    axis.text(x, y, text, ha="center", va="center", fontsize=7.5, color=colour)
            axis.set_xticks(range(len(keeps)), [f"{100 * keep:g} %" for keep in keeps])
            axis.set_yticks(range(len(layers)), layers)
            axis.grid(False)
            axis.set_title(next(row.label for row in found if row.network == network))
        schemes = "c: channel scheme, s: spatial scheme; layers left out are dense everywhere"
        figure.supxlabel(f"parameters kept; {schemes}", fontsize=9)
        figure.colorbar(image, ax=axes[0], label="rank / full rank")


def _share(entry: list[Any] | None) -> float:
    return entry[1] / entry[2] if entry else 1.0


def page(more: Sequence[str] = ()) -> str:
    """docs/results.md: a chapter for each directory of CIFAR-10 results, and ``more`` chapters."""
    origin = "Made by `python benchmarks/tables.py` from the files under `benchmarks/results`; do not edit."
    chapters = [_chapter(RESULTS / name, added) for name, added in DIRECTORIES.items() if (RESULTS / name).exists()]
    return "\n".join([f"# Results\n\n{origin}\n", *chapters, *more])


def _chapter(directory: Path, added: str) -> str:
    comparison = read_results(directory)
    latency = next(iter(sorted((directory / "latency").glob("plain-*.json"))), None)
    timed = json.loads(latency.read_text()) if latency else None
    pictures = f"../{directory.relative_to(ROOT).as_posix()}"
    git = comparison.provenance.get("git")
    parts = [
        f"## {comparison.title}{added}",
        caption(comparison) + (f" Commit {git['commit'][:12]}." if git else ""),
        "Every method gets the same trained network and the same share of all its parameters, norms, biases and the "
        "classifier included. Methods marked † look at unlabelled images themselves, so that their first number is "
        "not data-free. Weight pruning counts nonzero weights: it needs an index for each and runs no faster.",
    ]
    for name, label in {row.network: row.label for row in comparison.rows}.items():
        parts += [f"### Every method on: {label}", by_method(comparison, name).to_markdown()]
        if name in FIGURES:
            parts.append(f"![Accuracy against parameters, all methods]({pictures}/methods_{name}.png)")
    explained = [text for name, text in EXPLAINED.items() if name in _dropped(comparison)]
    parts += [
        "### Points below dense",
        " ".join(["SVD with global ranks; mean and standard deviation over seeds.", *explained]),
        drops(comparison).to_markdown(),
        f"![Points below dense]({pictures}/accuracy.png)",
    ]
    smooth = on_smooth(comparison)
    if len(smooth.rows) > 1:
        parts += ["### Do pruning and folding do better on smooth networks?", smooth.to_markdown()]
    parts += ["### Parameters, MACs and time", cost(comparison, timed).to_markdown()]
    if timed:
        machine = timed["provenance"]["machine"]
        where = f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, {timed['provenance']['date']}"
        parts.append(f"Median of interleaved forward passes, float32, layers as each method leaves them. {where}.")
    if (directory / "ranks.png").exists():
        parts += ["### Ranks", f"![Rank of every layer]({pictures}/ranks.png)"]
    return "\n\n".join(parts) + "\n"
