"""Figures for a report: singular values, accuracy against size, weights as an image. Each comes with its data as CSV.

Sized for a column of 900 pixels on a screen of twice that density. The colours are those of Okabe and Ito, "Color
universal design" (2008), which colour-blind readers can tell apart.
"""

from __future__ import annotations

import importlib.util
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smoothk.candidates import find_candidates
from smoothk.checkpoint import atomic_write
from smoothk.recipes.compare import Comparison, Row, mean
from smoothk.recipes.methods import METHODS
from smoothk.report import Table
from smoothk.unfolding import unfold

WIDTH = 9.0  # inches
DPI = 200
CORNER = 48  # rows and columns of a weight that can be told apart
MEASURES = {"accuracy": "data-free", "accuracy_recalibrated": "batch norm recalibrated"}
DENSE_LINE: dict[str, Any] = {"linestyle": (0, (4, 3)), "linewidth": 0.9}
COLOURS = ("#4D4D4D", "#D55E00", "#0072B2", "#009E73", "#CC79A7")
MARKERS = ("o", "s", "^", "D", "v")
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "savefig.dpi": DPI,
    "savefig.facecolor": "white",
}


def check_matplotlib() -> None:
    """Raise ImportError, with what to do, if figures cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("figures need matplotlib: pip install matplotlib")


@contextmanager
def styled_figure(
    path: str | Path, rows: int, columns: int, height: float, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """A styled figure and its array of axes; written to ``path`` in one step when the block ends."""
    check_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **options)
        yield figure, axes
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    atomic_write(path, buffer.getvalue())


def _write_data(path: str | Path, table: Table) -> None:
    atomic_write(Path(path).with_suffix(".csv"), table.to_csv().encode())


def _legend(figure: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """One legend above all panels, in two rows where one would be too long."""
    columns = len(labels) if sum(map(len, labels)) < 70 else -(-len(labels) // 2)
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)


def look(index: int) -> dict[str, str]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def _kernels(model: nn.Module) -> dict[str, Tensor]:
    """Weights, by layer, of the convolutions with more than one tap; of all layers where there is none."""
    layers = find_candidates(model).layers
    weights = {name: layer.weight.detach() for name, layer in layers.items()}
    spread = {name: w for name, w in weights.items() if w.ndim > 2 and w[0, 0].numel() > 1}
    chosen = spread or weights
    if not chosen:
        raise ValueError("model must have a convolution or linear layer to draw, got none")
    return chosen


def _weight(model: nn.Module, layer: str) -> Tensor:
    layers = find_candidates(model).layers
    if layer not in layers:
        begin = "layers must name convolutions or linear layers of every network"
        raise ValueError(f"{begin}, got {layer!r}; by themselves networks of one architecture are drawn")
    return layers[layer].weight.detach()


def default_layers(model: nn.Module) -> list[str]:
    """Three layers of a network: a quarter of the way in, half-way, and the last."""
    names = list(_kernels(model))
    return list(dict.fromkeys(names[i] for i in (len(names) // 4, len(names) // 2, len(names) - 1)))


def singular_values(
    networks: Mapping[str, nn.Module],
    path: str | Path,
    *,
    layers: Sequence[str] | None = None,
    unfolding: str = "channel",
) -> None:
    """Draw how the singular values of a few layers decay, a line for each network.

    Args:
        networks: models of one architecture, by the name in the legend.
        path: PNG to write; the plotted data go beside it as CSV.
        layers: names of layers; default: `default_layers`.
        unfolding: ``"channel"`` or ``"spatial"``, see `smoothk.nuclear_norm`.
    """
    layers = layers or default_layers(next(iter(networks.values())))
    data: list[list[object]] = []
    with styled_figure(path, 1, len(layers), 2.9, sharey=True) as (figure, axes):
        for axis, layer in zip(axes[0], layers, strict=True):
            for index, (name, model) in enumerate(networks.items()):
                weight = _weight(model, layer)
                values = torch.linalg.svdvals(unfold(weight, unfolding)[0].double())
                ratios = (values / values[0]).tolist()
                positions = [(i + 1) / len(ratios) for i in range(len(ratios))]
                axis.plot(positions, ratios, color=look(index)["color"], label=name)
                data += [[layer, name, i + 1, len(ratios), f"{ratio:.5g}"] for i, ratio in enumerate(ratios)]
            rows, columns = unfold(weight, unfolding).shape[1:]
            axis.set_title(f"{layer}  ({rows}×{columns})")
            axis.set_yscale("log")
            axis.set_xlim(0, 1)
            axis.set_ylim(1e-5, 1.5)  # smaller ones are rounding
            axis.set_xlabel("index / full rank")
        axes[0, 0].set_ylabel(f"σᵢ / σ₁, {unfolding} unfolding")
        _legend(figure, *axes[0, 0].get_legend_handles_labels())
    _write_data(path, Table(["layer", "network", "index", "full rank", "sigma / largest"], data))


def accuracy(
    comparison: Comparison, path: str | Path, *, methods: Sequence[str] | None = None, lowest: float = 0.0
) -> None:
    """Draw test accuracy against parameters kept, data-free and recalibrated: a column of panels for each method.

    A single method has its two panels side by side. Sizes that a method cannot reach are left out. With several seeds:
    the mean, and a bar from the lowest to the highest. A dashed line is the network before compression.

    Args:
        comparison: the rows to draw.
        path: PNG to write; the plotted data go beside it as CSV.
        methods: keys of `smoothk.recipes.methods.METHODS`; default: all there are.
        lowest: accuracy in % at the bottom; what lies below is cut off.
    """
    methods = list(methods or dict.fromkeys(row.method for row in comparison.rows))
    networks = {row.network: row.label for row in comparison.rows}
    keeps = sorted({row.keep for row in comparison.rows})
    groups = comparison.groups()
    panels = [(method, field) for field in MEASURES for method in methods]
    rows, columns = (1, 2) if len(methods) == 1 else (2, len(methods))
    data: list[list[object]] = []
    with styled_figure(path, rows, columns, 1.4 + 1.8 * rows, sharex=True, sharey=True) as (figure, axes):
        for axis, (method, field) in zip(axes.flat, panels, strict=True):
            for index, (network, label) in enumerate(networks.items()):
                cells = [groups.get((keep, method, network), []) for keep in keeps]
                cells = [cell for cell in cells if cell and all(getattr(row, field) is not None for row in cell)]
                if not cells:
                    continue
                points = [_point(cell, field) for cell in cells]
                _curve(axis, points, label, index)
                data += [[METHODS[method].label, MEASURES[field], network, *point] for point in points]
            axis.set_title(f"{METHODS[method].label}\n{MEASURES[field]}")
            axis.set_xscale("log")
            axis.set_xticks([100 * keep for keep in keeps], [f"{100 * keep:g}" for keep in keeps])
            axis.set_xticks([], minor=True)
        axes[0, 0].set_ylim(lowest, 104 if lowest == 0 else None)
        figure.supxlabel("parameters kept (%)", fontsize=STYLE["axes.labelsize"])
        figure.supylabel("test accuracy (%)", fontsize=STYLE["axes.labelsize"])
        handles, labels = axes[0, 0].get_legend_handles_labels()
        handles += axes[0, 0].plot([], [], color="#888888", **DENSE_LINE)
        _legend(figure, handles, [*labels, "dense"])
    _write_data(path, Table(["method", "measure", "network", "kept %", "accuracy", "lowest", "highest", "dense"], data))


def _point(rows: Sequence[Row], field: str) -> list[float]:
    """Parameters kept in %, accuracy (mean, lowest, highest over seeds), and accuracy before."""
    values = [getattr(row, field) for row in rows]
    kept = 100 * mean(rows, "parameters") / mean(rows, "parameters_before")
    return [kept, mean(rows, field), min(values), max(values), mean(rows, "dense_accuracy")]


def _curve(axis: Any, points: Sequence[Sequence[float]], label: str, index: int) -> None:
    kept, mid, low, high, dense = zip(*points, strict=True)
    bars = ([m - e for m, e in zip(mid, low, strict=True)], [e - m for m, e in zip(mid, high, strict=True)])
    axis.axhline(dense[0], color=look(index)["color"], **DENSE_LINE)
    axis.errorbar(kept, mid, bars, label=label, elinewidth=0.8, **look(index))


def weight_rows(networks: Mapping[str, nn.Module], path: str | Path, *, layer: str | None = None) -> None:
    """Draw one layer's unfolded weight as an image, a panel for each network: rows are output channels.

    Every matrix is divided by the root mean square of its entries and drawn on the same colour scale; large ones are
    cut to their upper left corner.

    Args:
        networks: models of one architecture, by the title of their panel.
        path: PNG to write; the plotted data go beside it as CSV.
        layer: name of the layer; default: the second of `default_layers`.
    """
    first = next(iter(networks.values()))
    layer = layer or default_layers(first)[len(default_layers(first)) // 2]
    data: list[list[object]] = []
    with styled_figure(path, 1, len(networks), 2.6, sharey=True) as (figure, axes):
        for axis, (name, model) in zip(axes[0], networks.items(), strict=True):
            matrix = unfold(_weight(model, layer))[0].float()
            corner = (matrix / matrix.square().mean().sqrt())[:CORNER, :CORNER].numpy()
            image = axis.imshow(corner, cmap="RdBu_r", vmin=-3, vmax=3, interpolation="nearest", aspect="auto")
            axis.grid(False)
            axis.set_title(textwrap.fill(name, 72 // len(networks)))
            data += [[name, i, *(round(v, 4) for v in row)] for i, row in enumerate(corner.tolist())]
        axes[0, 0].set_ylabel("output channel")
        figure.supxlabel("input channel × kernel tap", fontsize=STYLE["axes.labelsize"])
        figure.supxlabel("input channel × kernel tap", fontsize=STYLE["axes.labelsize"])
        shown = f"{corner.shape[0]}×{corner.shape[1]} of {matrix.shape[0]}×{matrix.shape[1]}"
        figure.suptitle(f"{layer}, {shown}", fontsize=STYLE["axes.titlesize"])
        figure.colorbar(image, ax=axes[0], label="weight / RMS")
    columns = [f"column {j}" for j in range(corner.shape[1])]
    _write_data(path, Table(["network", "row", *columns], data))
