"""Nsight Compute over one call of each main kernel: bytes, bandwidth, occupancy, use of the tensor cores."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_stages.sanitizers import CALLS, missing_tool
from gpu_stages.stage import Stage, Step
from smoothk.report import Table

SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis")
# By name in the results: metric, and what its base unit is multiplied by.
METRICS = {
    "us": ("gpu__time_duration.sum", 1e-3),
    "dram_bytes": ("dram__bytes.sum", 1.0),
    "dram_percent": ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", 1.0),
    "sm_percent": ("sm__throughput.avg.pct_of_peak_sustained_elapsed", 1.0),
    "occupancy_percent": ("sm__warps_active.avg.pct_of_peak_sustained_active", 1.0),
    "registers": ("launch__registers_per_thread", 1.0),
    "blocks": ("launch__grid_size", 1.0),
}
# The tensor cores' metrics are called otherwise on every architecture; the section has those that there are.
_TENSOR = re.compile(r"(?:sm__|smsp__).*pipe_tensor.*\.avg\.pct_of_peak_sustained_active")


def _step(call: str) -> Step:
    sections = [word for section in SECTIONS for word in ("--section", section)]
    output = ("--csv", "--page", "raw", "--print-units", "base", "--log-file", "{out}/ncu.csv")
    options = ("--profile-from-start", "off", "--clock-control", "none", "--metrics", "dram__bytes.sum")
    program = ("{python}", "{benchmarks}/gpu_calls.py", call, "--size", "main", "--profile", "--device", "{device}")
    return Step(call, ("ncu", *sections, *options, *output, *program), 150)


def read_csv(text: str) -> list[dict[str, Any]]:
    """One entry per launch, in their order, from the raw page: a line of names, one of units, one for each launch; or
    from the details page, a line for each metric. Metrics that the GPU does not have are None."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if not lines:
        return []
    rows = list(csv.DictReader(lines))
    if "Metric Name" in rows[0]:
        launches: dict[str, dict[str, str]] = {}
        for row in rows:
            launches.setdefault(row["ID"], dict(row))[row["Metric Name"]] = row["Metric Value"]
        rows = list(launches.values())
    return [_launch(row) for row in rows if row.get("ID")]  # the line of units has no number


def _launch(row: Mapping[str, str]) -> dict[str, Any]:
    values = {name: _number(row.get(metric), scale) for name, (metric, scale) in METRICS.items()}
    tensor = [_number(value, 1.0) for metric, value in row.items() if metric and _TENSOR.fullmatch(metric)]
    values["tensor_percent"] = max((value for value in tensor if value is not None), default=None)
    if values["us"] and values["dram_bytes"] is not None:
        values["tb_per_second"] = values["dram_bytes"] / values["us"] / 1e6
    return {"kernel": row["Kernel Name"], **values}


def _number(text: str | None, scale: float) -> float | None:
    try:
        return float((text or "").replace(",", "")) * scale
    except ValueError:  # n/a
        return None


def read_folder(folder: Path) -> dict[str, Any]:
    """`read_csv` by call."""
    files = {call: folder / call / "ncu.csv" for call in CALLS}
    return {call: read_csv(file.read_text(errors="replace")) for call, file in files.items() if file.exists()}


def profile_table(results: Mapping[str, Any]) -> Table:
    """The launches of every call, those of one kernel and grid once with their mean."""
    groups: dict[tuple[str, str, float | None], list[Mapping[str, Any]]] = {}
    for call, launches in results.items():
        for launch in launches:
            groups.setdefault((call, launch["kernel"], launch["blocks"]), []).append(launch)
    names = ("us", "tb_per_second", "dram_percent", "sm_percent", "tensor_percent", "occupancy_percent", "registers")
    rows = [
        [call, kernel, blocks, len(group), *(_mean(launch.get(name) for launch in group) for name in names)]
        for (call, kernel, blocks), group in groups.items()
    ]
    heads = ["µs", "TB/s", "DRAM %", "SM %", "tensor cores %", "occupancy %", "registers"]
    formats = {"blocks": ".0f", **dict.fromkeys(heads, ".1f"), "TB/s": ".2f", "registers": ".0f"}
    return Table(["call", "kernel", "blocks", "launches", *heads], rows, formats)


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


PROFILE = Stage(
    "profile",
    150,
    [_step(call) for call in CALLS],
    read_folder,
    lambda context: missing_tool("ncu", context),
)
