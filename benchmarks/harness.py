"""What every entry shares: sides, the gate that each must pass before it is timed, and the measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timing import Run, interleave, paired_ratio, peak_extra_bytes, spread, synchronize
from torch import Tensor

from smoothk import BackendUnavailable

COPY = "copy"  # the side that bandwidths are relative to
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size of an element
TIMED, RED, SKIPPED, GREEN = "timed", "red", "skipped", "green"


class Unavailable(Exception):
    """A side, a case or a weight set that cannot run here; the message says why."""


class DeviceLost(Exception):
    """A side broke the device for the rest of the process; the message names it."""


@dataclass(frozen=True)
class Side:
    """One implementation.

    Args:
        name: row of the table.
        make: builds the call to be timed (compiles, captures); raises `Unavailable` where it cannot.
        check: relative errors, by name, of what the call returned and left behind after ``case.reset()``.
        ours: a kernel of smoothk, whose reruns have to be bit-identical.
        before: called untimed before every sample.
        bytes: read and written by one call, where that is not the case's.
    """

    name: str
    make: Callable[[], Run]
    check: Callable[[Any], Mapping[str, float]]
    ours: bool = False
    before: Run | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class Case:
    """Sides that compute the same thing on the same tensors.

    Args:
        name: what is computed.
        options: JSON-able settings.
        sides: what is compared.
        baselines: the side that all ratios are relative to: the first of these that is green.
        tolerances: largest allowed value of each error.
        device: where it runs.
        reset: puts the tensors into the state that ``check`` and reruns start from.
        outputs: the tensors that a call writes.
        repeats: how often one call does the work (over as many copies of the tensors); times are per piece of work.
        bytes: that one piece of work has to read and write, or None where that is not what limits it.
    """

    name: str
    options: dict[str, Any]
    sides: Sequence[Side]
    baselines: Sequence[str]
    tolerances: Mapping[str, float]
    device: torch.device
    reset: Callable[[], None]
    outputs: Callable[[], list[Tensor]]
    repeats: int = 1
    bytes: int | None = None


@dataclass(frozen=True)
class Settings:
    """How much to measure."""

    samples: int = 20
    budget: float = 60.0
    reruns: int = 0
    gate_only: bool = False
    wanted: Sequence[str] = field(default_factory=tuple)
    unwanted: Sequence[str] = field(default_factory=tuple)

    def wants(self, name: str) -> bool:
        """Whether a side of that name was asked for: parts of names, all where none are given."""
        asked = not self.wanted or name == COPY or any(part in name for part in self.wanted)
        return asked and not any(part in name for part in self.unwanted)


def gate(side: Side, case: Case) -> tuple[dict[str, Any], Run | None]:
    """Build one side and compare it with the float64 reference: its record, and the call if it is green."""
    record: dict[str, Any] = {"name": side.name, "status": GREEN, "reason": None, "errors": {}}
    try:
        run = side.make()
        case.reset()
        returned = run()
        synchronize(case.device)
        record["errors"] = {name: float(error) for name, error in side.check(returned).items()}
    except (Unavailable, BackendUnavailable) as error:
        return {**record, "status": SKIPPED, "reason": str(error)}, None
    except Exception as error:  # whatever a kernel or a compiler raises makes the side red, not the run fail
        _check_device(side, case.device)
        return {**record, "status": RED, "reason": f"{type(error).__name__}: {_first_line(error)}"}, None
    wrong = [
        f"{name} error {error:.2g}, allowed {case.tolerances[name]:.2g}"
        for name, error in record["errors"].items()
        if not error <= case.tolerances[name]  # NaN is red
    ]
    if wrong:
        return {**record, "status": RED, "reason": "; ".join(wrong)}, None
    return record, run


def _check_device(side: Side, device: torch.device) -> None:
    try:
        synchronize(device)
    except RuntimeError as error:
        raise DeviceLost(f"{side.name}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


def measure(case: Case, settings: Settings) -> dict[str, Any]:
    """Gate every side, time the green ones interleaved, and return the case's record."""
    torch.compiler.reset()  # its limit of recompilations counts over all cases of a process
    sides = [side for side in case.sides if settings.wants(side.name)]
    records, runs = {}, {}
    for side in sides:
        records[side.name], run = gate(side, case)
        if run is not None:
            runs[side.name] = run
    baseline = next((name for name in case.baselines if name in runs), None)
    if not settings.gate_only:
        _time(case, baseline, {side.name: side for side in sides}, runs, records, settings)
    for side in sides:
        if side.ours and side.name in runs and settings.reruns:
            records[side.name]["reruns"] = rerun(case, runs[side.name], settings.reruns)
    return {
        "name": case.name,
        "options": case.options,
        "baseline": baseline,
        "bytes": case.bytes,
        "tolerances": dict(case.tolerances),
        "sides": list(records.values()),
    }


def _time(
    case: Case,
    baseline: str | None,
    sides: Mapping[str, Side],
    runs: Mapping[str, Run],
    records: Mapping[str, dict[str, Any]],
    settings: Settings,
) -> None:
    """Fill in times, ratios and peak memory of the green sides."""
    before = {name: side.before for name, side in sides.items() if side.before is not None}
    samples = interleave(runs, case.device, samples=settings.samples, budget=settings.budget, before=before)
    for name, run in runs.items():
        record, seconds = records[name], samples[name].seconds
        each = [1e3 * s / case.repeats for s in seconds]
        record |= {"status": TIMED, "ms": spread(each), "samples_ms": [round(ms, 5) for ms in each]}
        record["page_faults"] = spread([faults / case.repeats for faults in samples[name].page_faults])
        if baseline is not None:
            record["ratio"] = paired_ratio(seconds, samples[baseline].seconds)
        if COPY in runs and case.bytes is not None:
            moved = [(sides[side].bytes or case.bytes * case.repeats) for side in (name, COPY)]
            record["copy_fraction"] = moved[0] / moved[1] / paired_ratio(seconds, samples[COPY].seconds)["median"]
        if name in before:
            before[name]()
        record |= peak_extra_bytes(run, case.device)


def rerun(case: Case, run: Run, count: int) -> dict[str, int]:
    """Run ``count`` times from the same state and count how many gave the first one's bits."""
    case.reset()
    start = [tensor.detach().clone() for tensor in case.outputs()]
    first: list[Tensor] | None = None
    identical = 0
    for _ in range(count):
        torch._foreach_copy_(case.outputs(), start)
        returned = run()
        results = [*_tensors(returned), *case.outputs()]
        if first is None:
            first = [result.detach().clone() for result in results]
        identical += all(torch.equal(_bits(a), _bits(b)) for a, b in zip(results, first, strict=True))
    return {"count": count, "identical": identical}


def _tensors(returned: Any) -> list[Tensor]:
    if isinstance(returned, Tensor):
        return [returned]
    return [value for value in returned if isinstance(value, Tensor)] if isinstance(returned, list | tuple) else []


def _bits(tensor: Tensor) -> Tensor:
    """The tensor as integers, so that NaN and the sign of zero count."""
    return tensor.detach().contiguous().view(INTEGERS[tensor.element_size()])


def failed(record: Mapping[str, Any]) -> bool:
    """Whether a case holds a red side, or reruns that differed."""
    return any(
        side["status"] == RED or side.get("reruns", {}).get("identical") != side.get("reruns", {}).get("count")
        for side in record["sides"]
    )


def in_graph(case: Case, names: Sequence[str] | None = None) -> Case:
    """The case with every side (or those of ``names``) captured in a CUDA graph and replayed."""
    chosen = [side for side in case.sides if names is None or side.name in names]
    sides = [replace(side, make=graphed(side.make)) for side in chosen]
    return replace(case, name=f"{case.name}, CUDA graph", options={**case.options, "graph": True}, sides=sides)


def graphed(make: Callable[[], Run]) -> Callable[[], Run]:
    """``make`` with the call captured in a CUDA graph; the call replays it and returns the captured output tensors."""

    def build() -> Run:
        run = make()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            returned = run()

        def replay() -> Any:
            graph.replay()
            return returned

        return replay

    return build
