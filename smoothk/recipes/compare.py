"""Compression methods on trained networks, under one protocol.

Every method gets the same trained network and the same budget, a share of all parameters, and takes no gradient step.
Accuracy is measured twice on the test images: data-free, and after batch norm has been recalibrated on unlabelled
training images.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

import smoothk
from smoothk.layers import _LowRank
from smoothk.macs import count_macs
from smoothk.recipes import data
from smoothk.recipes.config import FREE_FIELDS, TrainConfig, check_type
from smoothk.recipes.methods import METHODS, count_parameters
from smoothk.recipes.provenance import stamp
from smoothk.recipes.train import evaluate
from smoothk.report import Table
from smoothk.svd import full_rank


def label(network: str, penalty: str) -> str:
    """A network's name and its penalty, said once: ``"plain"``, ``"nuclear 0.0002 (spatial)"``."""
    if penalty == "none":
        return network
    return penalty if penalty.startswith(network.partition("-")[0]) else f"{network}: {penalty}"


@dataclass(frozen=True)
class Network:
    """A trained network that takes part: the model in eval mode and how it was trained."""

    name: str
    model: nn.Module
    config: TrainConfig

    @property
    def penalty(self) -> str:
        """The penalty's terms, e.g. ``"nuclear 0.0002 (spatial)"``; ``"none"`` without one."""
        c = self.config
        detail = f"{c.norm}, normalized" if c.normalized else c.norm
        terms = [
            (c.first_order, f"first-order {c.first_order:g} ({detail})"),
            (c.second_order, f"second-order {c.second_order:g} ({detail})"),
            (c.nuclear, f"nuclear {c.nuclear:g} ({c.unfolding}{', normalized' if c.normalized else ''})"),
        ]
        return " + ".join(text for value, text in terms if value) or "none"

    @property
    def label(self) -> str:
        """What the network is called in figures and tables."""
        return label(self.name, self.penalty)


@dataclass(frozen=True)
class Row:
    """One network compressed by one method to one size. Accuracies in %; drops in points below the dense network.

    ``parameters`` and everything after it is None where the method cannot reach ``keep``; ``note`` says why.
    ``seconds`` is the time of the compression itself, recalibration not included; what a method does once for all sizes
    is in none of them. ``ranks`` has ``[scheme, rank, full rank]`` of every low-rank layer, by name.
    """

    network: str
    penalty: str
    seed: int
    method: str
    keep: float
    parameters_before: int
    macs_before: int
    dense_accuracy: float
    parameters: int | None = None
    macs: int | None = None
    accuracy: float | None = None
    accuracy_recalibrated: float | None = None
    seconds: float | None = None
    note: str = ""
    ranks: dict[str, list[Any]] | None = None

    def check(self) -> None:
        """Raise ValueError or TypeError unless every field has its type and range."""
        for item in fields(self):
            value = getattr(self, item.name)
            check_type(item.name, item.type, value)
            if isinstance(value, int | float) and not abs(value) < 2**63:  # NaN as well
                raise ValueError(f"{item.name} must be a finite number, got {value!r}")
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        measured = (self.parameters, self.macs, self.accuracy, self.accuracy_recalibrated)
        if len({value is None for value in measured}) > 1:
            raise ValueError("a row must have parameters, MACs and accuracies, or none of them")

    @property
    def label(self) -> str:
        """What the network is called in figures and tables."""
        return label(self.network, self.penalty)

    @property
    def drop(self) -> float | None:
        """Points lost, data-free."""
        return None if self.accuracy is None else self.dense_accuracy - self.accuracy

    @property
    def drop_recalibrated(self) -> float | None:
        """Points lost after recalibration."""
        return None if self.accuracy_recalibrated is None else self.dense_accuracy - self.accuracy_recalibrated


ROW_FIELDS = tuple(item.name for item in fields(Row) if item.name != "ranks")


@dataclass(frozen=True)
class Comparison:
    """Rows, and where they come from: ``data`` (the images), ``recipe`` (what the networks share), ``provenance``."""

    title: str
    data: dict[str, Any]
    calibration_images: int
    recipe: dict[str, Any]
    provenance: dict[str, Any]
    rows: tuple[Row, ...]

    def to_json(self) -> str:
        """JSON text that `from_json` reads back; a line for each row."""
        head = json.dumps({**asdict(self), "rows": []}, indent=1)
        rows = ",\n".join(f"  {json.dumps(asdict(row))}" for row in self.rows)
        return head.removesuffix("[]\n}") + f"[\n{rows}\n ]\n}}"

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """Read the text of `to_json`; ValueError if it is none."""
        try:
            values = json.loads(text)
            read = cls(**{**values, "rows": tuple(Row(**row) for row in values["rows"])})
            for item in fields(read):
                if item.name != "rows":
                    check_type(item.name, item.type, getattr(read, item.name))
            for row in read.rows:
                row.check()
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"text must be the JSON of a Comparison, got {text[:60]!r} ({error})") from None
        return read

    def rows_table(self) -> Table:
        """Every row with all its fields, for CSV."""
        return Table(
            [*ROW_FIELDS, "drop", "drop_recalibrated"],
            [[*(getattr(row, name) for name in ROW_FIELDS), row.drop, row.drop_recalibrated] for row in self.rows],
        )

    def table(self) -> Table:
        """Means over seeds, a line for each size, method and network; "sd" is the sample standard deviation."""
        columns = ["kept %", "method", "network", "parameters", "MACs", "dense", "data-free", "sd", "drop"]
        columns += ["+BN", "sd +BN", "drop +BN"]
        lines: list[list[object]] = []
        for (keep, method, network), rows in self.groups().items():
            line: list[object] = [100 * keep, METHODS[method].label, network]
            if any(row.parameters is None for row in rows):
                lines.append([*line, "unreachable", None, mean(rows, "dense_accuracy"), *[None] * 6])
                continue
            line += [round(mean(rows, "parameters")), round(mean(rows, "macs")), mean(rows, "dense_accuracy")]
            for value, drop in (("accuracy", "drop"), ("accuracy_recalibrated", "drop_recalibrated")):
                line += [mean(rows, value), _deviation(rows, value), mean(rows, drop)]
            lines.append(line)
        formats = dict.fromkeys(columns[5:], ".2f")
        return Table(columns, lines, {"kept %": "g", **formats})

    def overview(self) -> Table:
        """A line for each size and method, a column for each network: accuracy data-free / after recalibration."""
        groups = self.groups()
        networks = list(dict.fromkeys(row.network for row in self.rows))
        dense = [mean([row for row in self.rows if row.network == name], "dense_accuracy") for name in networks]
        lines: list[list[object]] = [[100, "dense", *(f"{accuracy:6.2f}" for accuracy in dense)]]
        for keep, method in dict.fromkeys((row.keep, row.method) for row in self.rows):
            cells = [_pair(groups.get((keep, method, name), [])) for name in networks]
            lines.append([100 * keep, METHODS[method].label, *cells])
        return Table(["kept %", "method", *networks], lines, {"kept %": "g"})

    def groups(self) -> dict[tuple[float, str, str], list[Row]]:
        """Rows by (keep, method, network): one row per seed."""
        groups: dict[tuple[float, str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.keep, row.method, row.network), []).append(row)
        return groups


def merge(parts: Sequence[Comparison]) -> Comparison:
    """One comparison with the rows of all; what is said of images, recipe and provenance is what all agree on.

    Raises:
        ValueError: no parts, or parts measured on different images.
    """
    if not parts or any(part.data != parts[0].data for part in parts):
        raise ValueError(f"parts must be comparisons on the same images, got {len(parts)} that differ")
    return replace(
        parts[0],
        recipe=_common([part.recipe for part in parts]),
        provenance=_common([part.provenance for part in parts]),
        rows=tuple(row for part in parts for row in part.rows),
    )


def _common(values: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The entries that are the same everywhere."""
    first, *others = values
    return {k: v for k, v in first.items() if all(k in other and other[k] == v for other in others)}


def mean(rows: Sequence[Row], name: str) -> float:
    """Mean of a field that all ``rows`` have."""
    return statistics.fmean(getattr(row, name) for row in rows)


def _deviation(rows: Sequence[Row], name: str) -> float | None:
    return statistics.stdev(getattr(row, name) for row in rows) if len(rows) > 1 else None


def _pair(rows: Sequence[Row]) -> str:
    if not rows or any(row.accuracy is None for row in rows):
        return "unreachable"
    return f"{mean(rows, 'accuracy'):6.2f} / {mean(rows, 'accuracy_recalibrated'):6.2f}"


def compare(
    networks: Sequence[Network],
    dataset: data.DataSet,
    keeps: Sequence[float],
    methods: Sequence[str],
    *,
    title: str,
    calibration_images: int = 5000,
    progress: bool = True,
) -> Comparison:
    """Compress every network by every method to every size and measure what is left.

    Args:
        networks: trained on ``dataset``; they are not changed.
        dataset: accuracy is that on its test images.
        keeps: shares of all parameters that may remain.
        methods: keys of `METHODS`.
        title: what is compared, in a few words.
        calibration_images: unlabelled training images for the recalibration; at most as many as there are.
        progress: one line per network and size on stderr.

    Raises:
        ValueError: an unknown method, or nothing to compare. A size that a method cannot reach is a row, no error.
        ImportError: a method needs a package that is not installed.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not (networks and keeps and methods):
        raise ValueError(f"methods must be of {', '.join(METHODS)}, one network and size at least, got {unknown}")
    for name in methods:
        needed = METHODS[name].needs
        if needed is not None and METHODS[name].missing:
            package = needed.replace("_", "-")
            raise ImportError(f"method {name!r} needs {package}, which is not installed: pip install {package}")
    count = min(calibration_images, len(dataset.train_images))
    calibration = data.calibration_batches(dataset, count)
    rows = []
    for network in networks:
        accuracy = partial(measure, dataset=dataset, config=network.config)
        bench = Bench(
            network.model,
            accuracy,
            calibration,
            example=data.normalize(dataset.test_images[:1], dataset.normalization),
            network=network.name,
            penalty=network.penalty,
            seed=network.config.seed,
        )
        for keep in keeps:
            rows += [bench.row(name, keep) for name in methods]
            if progress:
                print(f"{network.name}, seed {network.config.seed}: {100 * keep:g} % kept", file=sys.stderr, flush=True)
    return Comparison(title, dataset.provenance, count, _shared(networks), stamp(), tuple(rows))


class Bench:
    """One network, what measures it and what it is calibrated with.

    Args:
        model: trained, in eval mode; not changed.
        accuracy: of a model, in %.
        calibration: re-iterable of unlabelled batches, tensors.
        example: one input, for counting MACs.
        network, penalty, seed: fields of `Row`.
    """

    def __init__(
        self,
        model: nn.Module,
        accuracy: Callable[[nn.Module], float],
        calibration: Iterable[Tensor],
        example: Tensor,
        *,
        network: str = "plain",
        penalty: str = "none",
        seed: int = 0,
    ) -> None:
        self.model, self.accuracy, self.calibration, self.example = model, accuracy, calibration, example
        self.prepared: dict[str, Callable[[float], nn.Module]] = {}
        self.start = Row(
            network=network,
            penalty=penalty,
            seed=seed,
            method="dense",
            keep=1.0,
            parameters_before=count_parameters(model),
            macs_before=count_macs(model, example),
            dense_accuracy=accuracy(model),
        )

    def row(self, method: str, keep: float) -> Row:
        """``method``, a key of `METHODS`, at the size ``keep``; one that it cannot reach is a row with a note."""
        row = replace(self.start, method=method, keep=keep, note=METHODS[method].note)
        try:
            if method not in self.prepared:
                self.prepared[method] = METHODS[method].prepare(self.model, self.calibration)
            started = time.perf_counter()
            model = self.prepared[method](keep)
        except ValueError as error:
            return replace(row, note=str(error))
        seconds = time.perf_counter() - started
        accuracy = self.accuracy(model)
        smoothk.recalibrate_batch_norm(model, self.calibration)
        return replace(
            row,
            parameters=METHODS[method].count(model),
            macs=count_macs(model, self.example),
            accuracy=accuracy,
            accuracy_recalibrated=self.accuracy(model),
            seconds=round(seconds, 3),
            ranks=_ranks(model),
        )


def _ranks(model: nn.Module) -> dict[str, list[Any]] | None:
    """Scheme, rank and full rank of every low-rank layer; None if there is none."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, _LowRank)}
    return {name: _rank(layer) for name, layer in layers.items()} or None


def _rank(layer: _LowRank) -> list[Any]:
    scheme, groups = getattr(layer, "scheme", "channel"), getattr(layer, "groups", 1)
    return [scheme, layer.rank, full_rank(layer.weight.shape, groups, scheme)]


def measure(model: nn.Module, dataset: data.DataSet, config: TrainConfig) -> float:
    """Test accuracy in %, in the precision and memory format of the training run."""
    return evaluate(
        model,
        dataset.test_images,
        dataset.test_labels,
        normalization=dataset.normalization,
        precision=config.precision,
        channels_last=config.channels_last,
    )


def _shared(networks: Sequence[Network]) -> dict[str, Any]:
    """The fields of the configurations in which all networks agree; files and threads are no part of a recipe."""
    shared = _common([network.config.to_json() for network in networks])
    return {name: value for name, value in shared.items() if name not in FREE_FIELDS | {"threads"}}
