"""The plan that `plan_ranks` makes and `factorize` follows: which scheme and rank each layer gets."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from .report import Table
from .svd import full_rank

_SCHEMES = ("dense", "channel", "spatial")


@dataclass(frozen=True)
class LayerPlan:
    """One layer's part of a plan.

    Attributes:
        shape: of the dense weight.
        groups: of the convolution, 1 for a linear layer.
        scheme: ``"dense"`` (then ``rank`` is 0), ``"channel"`` or ``"spatial"``.
        rank: per group.
        parameters_before, parameters: of the weight, dense and as planned.
        energy: share of ``Σσ²`` kept; None in a plan read off a model.
        macs_before, macs: multiply-accumulates, where the plan was made with an example input.
        reason: why the layer has to stay dense.
    """

    shape: tuple[int, ...]
    groups: int
    scheme: str
    rank: int
    parameters_before: int
    parameters: int
    energy: float | None = None
    macs_before: int | None = None
    macs: int | None = None
    reason: str | None = None

    def check(self, name: str) -> None:
        """Raise ValueError that names the layer unless every field has its type and range."""
        sizes = (*self.shape, self.rank, self.parameters_before, self.parameters)
        if not all(_is_count(size) for size in sizes) or not _is_count(self.groups) or self.groups < 1:
            raise ValueError(f"layer {name!r} has a size that is not a non-negative int")
        if self.scheme not in _SCHEMES:
            raise ValueError(f"layer {name!r} has the unknown scheme {self.scheme!r}")
        if self.scheme != "dense":
            fits = len(self.shape) > 1 and self.shape[0] % self.groups == 0
            if not fits or not 1 <= self.rank <= full_rank(self.shape, self.groups, self.scheme):
                raise ValueError(f"layer {name!r} of shape {self.shape} cannot have rank {self.rank}")
        if self.energy is not None and not (_is_number(self.energy) and self.energy <= 1):
            raise ValueError(f"layer {name!r} has the energy {self.energy!r}")
        if not _is_pair_of_counts(self.macs_before, self.macs):
            raise ValueError(f"layer {name!r} has MACs that are not non-negative ints")
        if not isinstance(self.reason, str | None):
            raise ValueError(f"layer {name!r} has the reason {self.reason!r}")


@dataclass(frozen=True)
class RankPlan:
    """Scheme and rank of every convolution and linear layer of a model.

    ``print(plan)`` shows it; `to_json` and `from_json` go both ways. Counts cover the whole model: norms, biases and
    layers that cannot be factorised included. ``latency_before`` and ``latency`` are seconds, measured and predicted,
    where ``cost`` is ``"latency"``.
    """

    method: str
    cost: str
    keep: float
    parameters_before: int
    parameters: int
    macs_before: int | None = None
    macs: int | None = None
    layers: dict[str, LayerPlan] = field(default_factory=dict)
    latency_before: float | None = None
    latency: float | None = None

    @property
    def factorized(self) -> dict[str, LayerPlan]:
        """The layers that the plan replaces."""
        return {name: layer for name, layer in self.layers.items() if layer.scheme != "dense"}

    def table(self) -> Table:
        """One row per layer; energy is the share of ``Σσ²`` kept."""
        with_macs = self.macs is not None
        columns = ["layer", "weight", "scheme", "rank", "params before", "params", "energy"]
        columns += ["MACs before", "MACs"] if with_macs else []
        rows = []
        for name, layer in self.layers.items():
            scheme = f"dense ({layer.reason})" if layer.reason else layer.scheme
            row: list[object] = [name, "x".join(map(str, layer.shape)), scheme, layer.rank or None]
            row += [layer.parameters_before, layer.parameters, layer.energy]
            rows.append(row + ([layer.macs_before, layer.macs] if with_macs else []))
        return Table(columns, rows)

    def __str__(self) -> str:
        share = self.parameters / max(self.parameters_before, 1)
        head = f"{self.parameters:,} of {self.parameters_before:,} parameters kept ({100 * share:.2f} %)"
        if self.macs is not None and self.macs_before is not None:
            head += f", {self.macs:,} of {self.macs_before:,} MACs ({100 * self.macs / max(self.macs_before, 1):.2f} %)"
        if self.latency is not None and self.latency_before is not None:
            head += f", {1e3 * self.latency:.3g} of {1e3 * self.latency_before:.3g} ms"
        return f"{head}; method {self.method}, keep {self.keep:g} of {self.cost}\n{self.table()}"

    def to_json(self) -> str:
        """JSON text that `from_json` reads back to an equal plan."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RankPlan:
        """Read a plan; TypeError unless ``text`` is a str, ValueError unless it is the JSON of a plan."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        try:
            data = json.loads(text)
            layers = {n: LayerPlan(**{**layer, "shape": tuple(layer["shape"])}) for n, layer in data["layers"].items()}
            plan = cls(**{**data, "layers": layers})
            plan._check()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"text must be the JSON of a RankPlan, got {text[:60]!r} ({error})") from None
        return plan

    def _check(self) -> None:
        if not (isinstance(self.method, str) and isinstance(self.cost, str)):
            raise ValueError("method and cost must be strings")
        if not (_is_number(self.keep) and 0 <= self.keep <= 1):
            raise ValueError(f"keep must be in [0, 1], got {self.keep!r}")
        if not (_is_count(self.parameters_before) and _is_count(self.parameters)):
            raise ValueError("parameters must be non-negative ints")
        if not _is_pair_of_counts(self.macs_before, self.macs):
            raise ValueError("MACs must be non-negative ints")
        if not (self.latency_before is self.latency is None or _are_positive(self.latency_before, self.latency)):
            raise ValueError("latencies must be positive numbers")
        for name, layer in self.layers.items():
            layer.check(name)


def _are_positive(*values: Any) -> bool:
    return all(_is_number(value) and value > 0 for value in values)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_pair_of_counts(before: Any, after: Any) -> bool:
    return before is after is None or (_is_count(before) and _is_count(after))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < float("inf")
