"""What the files of the stages say: readers of single numbers, for the claims.

A reader returns a number, a text that says why there is none although the step ran, or None where it did not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from entries.low_rank_conv import BASELINE, CHANNELS_LAST
from harness import GREEN, RED
from low_rank_speed import geometric_mean
from speed import timed

from gpu_stages.stage import FINISHED, Record, read_record

Reader = Callable[[Path], "float | str | None"]
FUSED = f"{BASELINE}, fused"


def results_of(out: Path, stage: str) -> dict[str, Any]:
    """The results in a stage's record, empty where it has none."""
    record = read_record(out, stage)
    return record["results"] if record else {}


def bench_results(out: Path, stage: str, step: str) -> list[Record]:
    """What `bench.py` wrote in a step."""
    return [json.loads(path.read_text()) for path in sorted((out / stage / step).glob("*.json"))]


def cases_of(out: Path, stage: str, step: str, weights: str | None = None, dtype: str | None = None) -> list[Record]:
    """The cases of a step, of one weight set or dtype if given."""
    return [
        case
        for result in bench_results(out, stage, step)
        if weights in (None, result["set"]["name"]) and dtype in (None, result["dtype"])
        for case in result["cases"]
    ]


def side_number(stage: str, step: str, weights: str, case: str, side: str, number: Callable[[Record], float]) -> Reader:
    """A number of one side."""

    def read(out: Path) -> float | str | None:
        for found in (c for c in cases_of(out, stage, step, weights) if c["name"] == case):
            for each in (each for each in found["sides"] if each["name"] == side):
                try:
                    return number(each)
                except KeyError:
                    return f"{each['status']}: {each['reason']}"
        return None

    return read


def ratio(side: Record) -> float:
    """Its time over the baseline's, the median."""
    return side["ratio"]["median"]


def milliseconds(side: Record) -> float:
    return side["ms"]["median"]


def percent_of_copy(side: Record) -> float:
    return 100 * side["copy_fraction"]


def _ours(out: Path, stage: str, steps: Iterable[str], names: Iterable[str]) -> Iterator[Record]:
    for step in steps:
        for case in cases_of(out, stage, step):
            yield from (side for side in case["sides"] if side["name"] in names and side["status"] != "skipped")


def wrong_sides(stage: str, steps: Iterable[str], names: Iterable[str]) -> Reader:
    """How many of smoothk's sides were red; None where none ran, or a step did not end."""
    steps, names = tuple(steps), tuple(names)

    def read(out: Path) -> float | str | None:
        sides = list(_ours(out, stage, steps, names))
        record = read_record(out, stage)
        if record is None or not sides:
            return None
        # Exit status 1 is that of a red side or of other bits; what was killed or crashed may have more.
        ended = {step["name"] for step in record["steps"] if step["status"] == FINISHED or step.get("exit") == 1}
        red = [side for side in sides if side["status"] == RED]
        if red:
            return float(len(red))
        missing = [step for step in steps if step not in ended]
        return f"{', '.join(missing)} did not end" if missing else 0.0

    return read


def identical_reruns(stage: str, step: str, names: Iterable[str]) -> Reader:
    """The fewest identical reruns of smoothk's sides."""
    names = tuple(names)

    def read(out: Path) -> float | str | None:
        sides = list(_ours(out, stage, (step,), names))
        counts = [side["reruns"]["identical"] for side in sides if "reruns" in side]
        red = next((side for side in sides if side["status"] not in (GREEN, "timed")), None)
        return f"{red['status']}: {red['reason']}" if red else min(counts, default=None)

    return read


def largest_error(stage: str, step: str, names: Iterable[str], kinds: Iterable[str]) -> Reader:
    """Over all cases of a step, also those that were red for it."""
    names, kinds = tuple(names), tuple(kinds)

    def read(out: Path) -> float | str | None:
        sides = list(_ours(out, stage, (step,), names))
        errors = [side["errors"][kind] for side in sides for kind in kinds if kind in side["errors"]]
        if any(error != error for error in errors):
            return "NaN"
        return max(errors, default=None)

    return read


def over_fused(case: Record, library: str) -> float | None:
    """Time of the library's way, in the layout of smoothk's sides, over that of smoothk's kernel."""
    sides = timed(case)
    suffix = CHANNELS_LAST if case["options"]["layout"] == "channels_last" else ""
    if FUSED not in sides or library + suffix not in sides:
        return None
    return ratio(sides[library + suffix]) / ratio(sides[FUSED])


def low_rank_mean(
    library: str, step: str = "resnet18", rank: int | None = None, mode: str = "forward", graph: bool = True
) -> Reader:
    """Geometric mean of `over_fused` over the layers of a step, or over those with a k×k kernel of one rank."""

    def read(out: Path) -> float | str | None:
        cases = [
            case
            for case in cases_of(out, "low_rank_conv", step)
            if case["options"]["pass"] == mode
            and case["options"].get("graph", False) == graph
            and (rank is None or (case["options"]["rank"] == rank and case["options"]["kernel"] > 1))
        ]
        return geometric_mean(over_fused(case, library) for case in cases)

    return read


def failed_tests(step: str) -> Reader:
    """How many tests of a step failed; a text where it did not end or ran none."""

    def read(out: Path) -> float | str | None:
        record = read_record(out, "tests")
        entry = next((e for e in record["steps"] if e["name"] == step), None) if record else None
        if entry is None or "exit" not in entry:
            return None
        found = record["results"].get(step)
        if found is None:
            return f"{entry['status']}: exit status {entry['exit']}"
        if not found["passed"] and not found["failed"]:
            return f"all {found['skipped']} skipped"
        return float(found["failed"])

    return read


def sanitizer_errors(tool: str, call: str) -> Reader:
    """Errors that a tool found, and its warnings; a text where its summary is missing or the program failed."""

    def read(out: Path) -> float | str | None:
        record = read_record(out, "sanitize")
        entry = next((e for e in record["steps"] if e["name"] == f"{tool}-{call}"), None) if record else None
        if entry is None or "exit" not in entry:
            return None
        found = record["results"].get(tool, {}).get(call, {})
        if found.get("errors") is None:
            return f"{entry['status']}: no summary, exit status {entry['exit']}"
        count = found["errors"] + found["warnings"]
        return f"exit status {entry['exit']}" if not count and entry["status"] != FINISHED else float(count)

    return read


def backend(name: str) -> Reader:
    """What `smoothk.info` says of a backend after the build."""

    def read(out: Path) -> float | str | None:
        backends = results_of(out, "build").get("info", {}).get("backends", {})
        if name not in backends:
            return None
        return 1.0 if backends[name] == "available" else backends[name]

    return read
