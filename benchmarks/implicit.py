"""An image as a network: SIREN fitted plain and smooth, compressed by SVD; and at twice the resolution it has seen.

    python benchmarks/implicit.py --out DIR [--seeds 0 1 2] [--threads 1]

Fits that are in ``--out`` already are taken as they are. "fit" shows the image that the network was fitted to; "double"
fits the image at half its resolution and is measured on all of it. The nuclear norm trades PSNR before compression for
PSNR after it: every dose of `NETWORKS` is reported, none is chosen. Results, table and figures go to
``benchmarks/results/implicit``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cifar10_report import spread
from torch import Tensor
from torch.nn import functional as F

import smoothk
from smoothk.checkpoint import atomic_write
from smoothk.recipes import figures, implicit
from smoothk.recipes.compare import count_parameters
from smoothk.recipes.implicit import FitConfig, Siren
from smoothk.recipes.provenance import stamp
from smoothk.report import Table

RESULTS = Path(__file__).resolve().parent / "results" / "implicit"
KEEPS = (1.0, 0.5, 0.3, 0.2, 0.15, 0.1)
TASKS = {"fit": FitConfig(), "double": FitConfig(factor=2)}
NETWORKS = {
    "plain": {},
    "first order": {"first_order": 0.1, "decoupled": True},
    "nuclear 0.3": {"nuclear": 0.3, "decoupled": True},
    "nuclear 1": {"nuclear": 1.0, "decoupled": True},
    "nuclear 2": {"nuclear": 2.0, "decoupled": True},
}
NARROW = "narrower, trained at that size"
NARROW_LOOK = {"color": "#888888", "marker": "x", "linestyle": ":"}
PICTURE_NETWORK, PICTURE_KEEP = "nuclear 1", 0.3


@dataclass(frozen=True)
class Fit:
    """A finished fit: PSNR in dB against the full image for every share in `KEEPS`, as ``{keep: (parameters, dB)}``."""

    task: str
    network: str
    config: FitConfig
    seconds: float
    rows: dict[float, tuple[int, float]]
    provenance: dict[str, Any]

    def to_json(self) -> str:
        rows = [{"keep": keep, "parameters": count, "psnr": round(db, 4)} for keep, (count, db) in self.rows.items()]
        return json.dumps({**vars(self), "config": self.config.to_json(), "rows": rows}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Fit:
        values = json.loads(text)
        rows = {row["keep"]: (row["parameters"], row["psnr"]) for row in values["rows"]}
        return cls(**{**values, "config": FitConfig(**values["config"]), "rows": rows})


class Bench:
    """Fits, and what is known of those made before."""

    def __init__(self, out: Path, results: Path) -> None:
        self.out, self.results = out, results

    def fit(self, task: str, network: str, config: FitConfig, keeps: Sequence[float] = KEEPS) -> Fit:
        """The result of a fit, from its file if that is of this configuration."""
        name = file_name(task, network, config)
        file, weights = self.results / f"{name}.json", self.out / f"{name}.safetensors"
        if file.exists() and weights.exists():
            known = Fit.from_json(file.read_text())
            if known.config == config and list(known.rows) == list(keeps):
                return known
        started = time.perf_counter()
        model = implicit.fit(config)
        seconds = round(time.perf_counter() - started, 1)
        whole = implicit.load_image(config.image, config.size)
        rows = {}
        for keep in keeps:
            small = compressed(model, keep)
            rows[keep] = (count_parameters(small), implicit.psnr(implicit.render(small, config.size), whole))
        smoothk.save(model, weights)
        result = Fit(task, network, config, seconds, rows, stamp())
        atomic_write(file, result.to_json().encode())
        print(name, *(f"{100 * keep:g} %: {db:.2f}" for keep, (_, db) in rows.items()), file=sys.stderr, flush=True)
        return result

    def fit_narrow(self, plain: Fit, width: int) -> Fit:
        """A plain network like that of ``plain``, but of this width."""
        return self.fit(plain.task, f"narrow-{width}", replace(plain.config, width=width), (1.0,))

    def model(self, fit: Fit) -> Siren:
        """The network of a fit."""
        config = fit.config
        model = Siren(config.width, config.depth, config.omega)
        return smoothk.load(model, self.out / f"{file_name(fit.task, fit.network, config)}.safetensors").eval()


def file_name(task: str, network: str, config: FitConfig) -> str:
    """Of a fit, without an ending."""
    return f"{task}-{network.replace(' ', '-')}-{config.seed}"


def compressed(model: torch.nn.Module, keep: float) -> torch.nn.Module:
    """``model`` at a share of its parameters, by the weights alone."""
    return model if keep == 1 else smoothk.compress(model, keep).model


def width_for(config: FitConfig, parameters: int) -> int:
    """The largest width at which a network like that of ``config`` has no more ``parameters``."""
    with torch.device("meta"):
        return max(
            width
            for width in range(1, config.width + 1)
            if count_parameters(Siren(width, config.depth, config.omega)) <= parameters
        )


def narrower(plain: Fit, of_width: Callable[[int], Fit]) -> Fit:
    """Plain networks of the sizes that compression leaves, each trained at its size, as if they were one."""
    rows, fits = {}, []
    for keep, (parameters, _) in plain.rows.items():
        one = plain if keep == 1 else of_width(width_for(plain.config, parameters))
        rows[keep] = one.rows[1.0]
        fits.append(one)
    return replace(plain, network=NARROW, rows=rows, seconds=sum(fit.seconds for fit in fits))


def bicubic(config: FitConfig) -> float:
    """PSNR in dB of the halved image enlarged by bicubic interpolation."""
    return implicit.psnr(enlarged(config), implicit.load_image(config.image, config.size))


def enlarged(config: FitConfig) -> Tensor:
    """What the network has seen, enlarged by bicubic interpolation to the whole size."""
    small = implicit.seen(config)[None]
    return F.interpolate(small, size=(config.size,) * 2, mode="bicubic", align_corners=False)[0].clamp(0, 1)


def table(fits: Iterable[Fit], extra: Sequence[tuple[str, float]] = ()) -> Table:
    """PSNR, mean and standard deviation over seeds, a line for each network and a column for each size."""
    rows: list[list[object]] = [
        [name, len(group), *(spread([fit.rows[keep][1] for fit in group]) for keep in KEEPS)]
        for name, group in by_network(fits).items()
    ]
    rows += [[name, None, spread([value]), *[None] * (len(KEEPS) - 1)] for name, value in extra]
    return Table(["network", "seeds", *("dense" if keep == 1 else f"{100 * keep:g} % kept" for keep in KEEPS)], rows)


def by_network(fits: Iterable[Fit]) -> dict[str, list[Fit]]:
    groups: dict[str, list[Fit]] = {}
    for fit in fits:
        groups.setdefault(fit.network, []).append(fit)
    return groups


def draw_curves(fits: dict[str, list[Fit]], path: Path) -> None:
    """PSNR against parameters, a panel for each task; bars from the lowest to the highest seed."""
    data: list[list[object]] = []
    titles = {"fit": "the image it was fitted to", "double": "fitted to half the resolution, shown at twice that"}
    with figures.styled_figure(path, 1, len(fits), 3.6) as (figure, axes):
        for axis, (task, members) in zip(axes[0], fits.items(), strict=True):
            for index, (network, group) in enumerate(by_network(members).items()):
                values = [[fit.rows[keep][1] for fit in group] for keep in KEEPS]
                kept = [100 * group[0].rows[keep][0] / group[0].rows[1.0][0] for keep in KEEPS]
                middle = [statistics.fmean(value) for value in values]
                bars = [
                    [m - min(v) for m, v in zip(middle, values, strict=True)],
                    [max(v) - m for m, v in zip(middle, values, strict=True)],
                ]
                look = NARROW_LOOK if network == NARROW else figures.look(index)
                axis.errorbar(kept, middle, bars, label=network, elinewidth=0.8, **look)
                data += [
                    [task, network, *map("{:.4g}".format, (k, m, min(v), max(v)))]
                    for k, m, v in zip(kept, middle, values, strict=True)
                ]
            if members[0].config.factor > 1:
                value = bicubic(members[0].config)
                axis.axhline(value, color="#888888", **figures.DENSE_LINE)
                axis.annotate("bicubic", (10, value), xytext=(0, -12), textcoords="offset points")
                data.append([task, "bicubic", "", f"{value:.4g}", "", ""])
            axis.set_title(titles[task])
            axis.set_xscale("log")
            axis.set_xticks([100 * keep for keep in KEEPS], [f"{100 * keep:g}" for keep in KEEPS])
            axis.set_xticks([], minor=True)
            axis.set_xlabel("parameters kept (%)")
        axes[0, 0].set_ylabel("PSNR (dB)")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    columns = ["task", "network", "kept %", "PSNR", "lowest", "highest"]
    atomic_write(path.with_suffix(".csv"), Table(columns, data).to_csv().encode())


def draw_pictures(bench: Bench, fits: dict[str, list[Fit]], path: Path) -> None:
    """A row of pictures for each task: the original, and plain and smooth before and after compression."""
    share = f"{100 * PICTURE_KEEP:g} %"
    with figures.styled_figure(path, len(fits), 5, 2.1 * len(fits) + 0.2) as (_, axes):
        for line, members in zip(axes, fits.values(), strict=True):
            config = members[0].config
            original = implicit.load_image(config.image, config.size)
            shown = [("original" if config.factor == 1 else "original, seen at half its size", original)]
            if config.factor > 1:
                shown = [("original", original), ("bicubic", enlarged(config))]
            for name in ("plain", PICTURE_NETWORK):
                model = bench.model(by_network(members)[name][0])
                keeps = (1.0, PICTURE_KEEP) if config.factor == 1 or name != "plain" else (1.0,)
                for keep in keeps:
                    title = f"{name}, all" if keep == 1 else f"{name}, {share} kept"
                    shown.append((title, implicit.render(compressed(model, keep), config.size)))
            for axis, (title, picture) in zip(line, shown, strict=True):
                quality = "" if picture is original else f"\n{implicit.psnr(picture, original):.1f} dB"
                axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
                axis.set_title(title + quality)
                axis.set_axis_off()


def main() -> None:
    """Fit what is missing, write results, tables and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the fitted networks")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for results and figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for directory in (args.out, args.results):
        directory.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.out, args.results)
    fits: dict[str, list[Fit]] = {}
    texts = []
    for task, base in TASKS.items():
        found = [
            bench.fit(task, name, replace(base, seed=seed, **options))
            for name, options in NETWORKS.items()
            for seed in args.seeds
        ]
        extra = [("bicubic", bicubic(base))] if base.factor > 1 else []
        if base.factor == 1:
            found += [narrower(fit, partial(bench.fit_narrow, fit)) for fit in found if fit.network == "plain"]
        fits[task] = found
        texts += [caption(task, found), table(found, extra).to_markdown()]
    atomic_write(args.results / "results.md", ("\n\n".join(texts) + "\n").encode())
    draw_curves(fits, args.results / "psnr.png")
    draw_pictures(bench, fits, args.results / "pictures.png")


def caption(task: str, fits: Sequence[Fit]) -> str:
    """What the numbers are, and where they were measured."""
    config, where = fits[0].config, fits[0].provenance
    what = "" if config.factor == 1 else f", fitted at {config.size // config.factor}² and measured on all of it"
    return (
        f"PSNR in dB, data-free SVD, against the share of parameters kept: SIREN of {fits[0].rows[1.0][0]:,} "
        f"parameters ({config.depth} hidden layers of {config.width}), {config.image} of scikit-learn at "
        f"{config.size}²{what}; {config.steps} steps of Adam. smoothk {where['versions']['smoothk']}, torch "
        f"{where['versions']['torch']}, {where['machine']['cpu']}, {where['date']}."
    )


if __name__ == "__main__":
    main()
