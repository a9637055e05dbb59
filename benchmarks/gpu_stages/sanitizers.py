"""compute-sanitizer over small calls of every kernel.

memcheck finds accesses outside of allocations, racecheck races on shared memory, initcheck reads of memory that nobody
wrote, synccheck barriers that not all threads reach. Races between blocks, on global memory, no tool sees: for those
are the thousand reruns of the other stages.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from gpu_stages.stage import Context, Stage, Step

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
CALLS = ("difference", "polar", "low_rank_conv")
FOUND = 99  # exit status where a tool found something
_ERRORS = re.compile(r"^=+ ERROR SUMMARY: (\d+) errors?", re.M)
_HAZARDS = re.compile(r"^=+ RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)", re.M)
_FIRST = re.compile(r"^=+ ((?:Invalid|Error|Warning|Uninitialized|Barrier|Program hit|Device|Internal).*)$", re.M)


def _step(tool: str, call: str) -> Step:
    options = ("--tool", tool, "--error-exitcode", str(FOUND), "--report-api-errors", "no")
    command = ("compute-sanitizer", *options, "{python}", "{benchmarks}/gpu_calls.py", call, "--device", "{device}")
    # With torch's cache of allocations, what lies between two tensors would be somebody's memory, and written once.
    return Step(f"{tool}-{call}", command, 90, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def read_log(text: str) -> dict[str, Any]:
    """Errors and warnings of one run from what it printed; None for both where it has no summary."""
    hazards, errors = _HAZARDS.findall(text), _ERRORS.findall(text)
    found: dict[str, Any] = {"errors": None, "warnings": None}
    if hazards:
        found = {"errors": sum(int(e) for e, _ in hazards), "warnings": sum(int(w) for _, w in hazards)}
    elif errors:
        found = {"errors": sum(map(int, errors)), "warnings": 0}
    first = _FIRST.search(text)
    return {**found, "first": first[1][:300] if first else None}


def read_folder(folder: Path) -> dict[str, Any]:
    """`read_log` by tool and call."""
    results: dict[str, Any] = {}
    for tool in TOOLS:
        for call in CALLS:
            log = folder / f"{tool}-{call}" / "log.txt"
            if log.exists():
                results.setdefault(tool, {})[call] = read_log(log.read_text(errors="replace"))
    return results


def missing_tool(name: str, context: Context) -> str | None:
    """Why a tool of the CUDA toolkit cannot be used."""
    if context.device != "cuda":
        return "needs a CUDA device"
    return None if shutil.which(name) else f"{name} is not on PATH"


SANITIZE = Stage(
    "sanitize",
    300,
    [_step(tool, call) for tool in TOOLS for call in CALLS],
    read_folder,
    lambda context: missing_tool("compute-sanitizer", context),
)
