"""Everything there is to measure on one CUDA GPU, in one command that needs no network.

    PYTHONPATH=. python benchmarks/gpu.py --out DIR [--only check ceilings difference graphs step nuclear low_rank_conv]
                                        [--dry-run]

Not yet run on a GPU. A checkout will do, installed or not; CuPy is used where it is installed. The kernels are compared
with float64 first. Every command of a part is a process of its own with a time limit, so that a kernel that hangs or
breaks the device costs that command and not the run; where that happens, the command is repeated without smoothk's
kernels, for the baselines. Results lie in DIR as soon as they are measured, ``gpu.json`` says what became of each
command, and the summary at the end can be had again with ``--only summary``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import speed
import torch
from bench import DEVICE_LOST
from entries.nuclear import TRITON

from smoothk.checkpoint import atomic_write
from smoothk.report import Table

HERE = Path(__file__).resolve().parent
OURS = ("fused", "triton")  # sides that a repetition leaves out


@dataclass(frozen=True)
class Command:
    """One call of a script beside this one, and the minutes it may take."""

    script: str
    arguments: tuple[str, ...]
    minutes: float


LOW_RANK = "--dtype bfloat16 --layout channels_last"


def _bench(text: str, minutes: float) -> Command:
    return Command("bench.py", tuple(text.split()), minutes)


PARTS: dict[str, list[Command]] = {
    "check": [
        _bench("difference --gate-only --sides fused --set odd resnet18", 3),
        _bench("nuclear --gate-only --sides auto triton", 3),
        _bench(
            "difference --gate-only --sides fused --set odd --dtype float32 bfloat16 float16 float64 "
            "--norm l2 l1 l21 huber --normalized no yes --dim 0 1 0,1 2,3",
            8,
        ),
    ],
    "ceilings": [Command("ceilings.py", (), 2)],
    "difference": [
        _bench("difference --set resnet18 --budget 20", 8),
        _bench("difference --set vit_b16 --orders first both --budget 20", 8),
        _bench("difference --set resnet50 --orders first both --budget 20", 8),
        _bench("difference --set resnet18 vit_b16 --orders first --dtype bfloat16 --budget 20", 6),
        _bench("difference --set 4gib --orders first --budget 20", 6),
    ],
    "graphs": [_bench("difference --gate-only --sides fused --reruns 1000", 5)],
    "step": [_bench("step --budget 60", 5)],
    "nuclear": [_bench("nuclear --set resnet18 --budget 60", 8), _bench("nuclear --set vit_b16 --budget 60", 8)],
    "low_rank_conv": [
        _bench(f"low_rank_conv {LOW_RANK} --networks resnet18_cifar --batches 1 8 --gate-only --sides fused", 4),
        _bench(f"low_rank_conv {LOW_RANK} --networks resnet18_cifar --batches 128 --budget 3", 8),
        _bench(f"low_rank_conv {LOW_RANK} --networks resnet50 --batches 32 --budget 3", 8),
    ],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for; 1 if a command did not end with status 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for results, figures and gpu.json")
    parser.add_argument("--only", nargs="+", choices=[*PARTS, "summary"], default=list(PARTS), help="parts to run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the script out")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and their limits, run none")
    args = parser.parse_args(argv)
    plan = {part: PARTS[part] for part in args.only if part in PARTS}
    if args.dry_run:
        print(plan_table(plan))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("this torch sees no CUDA device")
    args.out.mkdir(parents=True, exist_ok=True)
    bad = False
    for part, commands in plan.items():
        for command in commands:
            bad |= run(part, command, args) != 0
    print(f"\n{summary(args.out)}")
    return int(bad)


def plan_table(plan: dict[str, list[Command]]) -> Table:
    """What would run, and for how long at most."""
    rows = [[part, " ".join((c.script, *c.arguments)), c.minutes] for part, commands in plan.items() for c in commands]
    return Table(["part", "command", "minutes"], [*rows, ["", "all", sum(row[2] for row in rows)]], {"minutes": "g"})


def run(part: str, command: Command, args: argparse.Namespace) -> int:
    """Run one command and, if smoothk's kernels broke it, run it without them; its exit status, 1 for a timeout."""
    status = _logged(part, command, args, args.out / part)
    if command.script == "bench.py" and (status is None or status < 0 or status == DEVICE_LOST):
        _logged(part, command, args, args.out / f"{part}-baselines", without=OURS)
    return 1 if status is None else status


def _logged(
    part: str, command: Command, args: argparse.Namespace, out: Path, without: Sequence[str] = ()
) -> int | None:
    """`call`, with its outcome added to gpu.json."""
    arguments = [*command.arguments, "--device", args.device, *(["--without", *without] if without else [])]
    shown = " ".join([command.script, *arguments])
    print(f"\n=== {part}: {shown} (at most {command.minutes:g} min)", flush=True)
    start = time.perf_counter()
    status = call([sys.executable, str(HERE / command.script), *arguments, "--out", str(out)], 60 * command.minutes)
    entry = {
        "part": part,
        "command": shown,
        "status": "timeout" if status is None else status,
        "seconds": round(time.perf_counter() - start, 1),
    }
    path = args.out / "gpu.json"
    log: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    atomic_write(path, json.dumps([*log, entry], indent=1).encode() + b"\n")
    return status


def call(command: Sequence[str], seconds: float) -> int | None:
    """Exit status of a command; None if it was killed, with everything it started, at its time limit."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(seconds)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return None
        raise


@dataclass(frozen=True)
class Target:
    """A figure to show: one number of one side in a case of a result of a part."""

    what: str
    wanted: str
    part: str
    weights: str
    case: str
    side: str
    number: Callable[[speed.Record], float]

    def read(self, out: Path) -> float | str | None:
        """The number, why there is none, or None where nothing has been measured."""
        for path in (out / self.part).glob(f"*-{self.weights}-*.json"):
            result = json.loads(path.read_text())
            if result["dtype"] != "float32":
                continue
            cases = [case for case in result["cases"] if case["name"] == self.case]
            for side in (side for case in cases for side in case["sides"] if side["name"] == self.side):
                try:
                    return self.number(side)
                except KeyError:
                    return f"{side['status']}: {side['reason']}"
        return None


def _ratio(side: speed.Record) -> float:
    return side["ratio"]["median"]


def _identical(side: speed.Record) -> float:
    return side["reruns"]["identical"]


def _percent_of_copy(side: speed.Record) -> float:
    return 100 * side["copy_fraction"]


FIRST, GRAPH = "first order, l2", "first order, l2, CUDA graph"
STEP, STEP_GRAPH = "ResNet-18 training step, batch 128", "ResNet-18 training step, batch 128, CUDA graph"
NUCLEAR = "nuclear norm"
TARGETS = [
    Target("ResNet-18: % of copy bandwidth", ">= 70", "difference", "resnet18", GRAPH, "fused", _percent_of_copy),
    Target("ResNet-50: % of copy bandwidth", ">= 80", "difference", "resnet50", GRAPH, "fused", _percent_of_copy),
    Target("ViT-B/16: % of copy bandwidth", ">= 85", "difference", "vit_b16", GRAPH, "fused", _percent_of_copy),
    Target("eager / fused", ">= 20", "difference", "resnet18", FIRST, "eager", _ratio),
    Target("compile(autograd) / fused", ">= 2.5", "difference", "resnet18", FIRST, "compile(autograd)", _ratio),
    Target("compile(in place) / fused, graphs", ">= 1.2", "difference", "resnet18", GRAPH, "compile(in place)", _ratio),
    Target("replays with the same bits", "1000", "graphs", "resnet18", GRAPH, "fused", _identical),
    Target("step with / without penalty", "<= 1.02", "step", "resnet18", STEP, "fused", _ratio),
    Target("the same in a graph", "<= 1.02", "step", "resnet18", STEP_GRAPH, "fused", _ratio),
    Target("nuclear norm, ms", "<= 1", "nuclear", "resnet18", NUCLEAR, TRITON, lambda side: side["ms"]["median"]),
    Target("svd / nuclear", ">= 100", "nuclear", "resnet18", NUCLEAR, "svd", _ratio),
    Target("eigh / nuclear", ">= 30", "nuclear", "resnet18", NUCLEAR, "eigh", _ratio),
    Target("CuPy's batched eigh / nuclear", ">= 4", "nuclear", "resnet18", NUCLEAR, "cupy syevd", _ratio),
]


def summary(out: Path) -> Table:
    """The figures to show beside what was measured; empty where it was not."""
    return Table(["figure", "wanted", "measured"], [[t.what, t.wanted, t.read(out)] for t in TARGETS])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and end the command under way
    sys.exit(main())
