"""Stages that measure times: the ceilings of the GPU, and the entries of `bench.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_stages.stage import Stage, Step

OURS = ("fused", "triton")  # parts of the names of smoothk's sides
# The factors of a square 3x3 layer at this share have a quarter of its channels: 28 % of its parameters, 72 % fewer.
QUARTER_RANK = "0.27778"
LOW_RANK = f"low_rank_conv --dtype bfloat16 --layout channels_last --keep {QUARTER_RANK} --networks"
NORMS = "--norm l2 l1 l21 huber --normalized no yes --dim 0 1 0,1 2,3"


def bench(name: str, arguments: str, seconds: float, *, extra: bool = False) -> Step:
    """`bench.py` with its files in the step's folder."""
    command = ("{python}", "{benchmarks}/bench.py", *arguments.split(), "--device", "{device}", "--out", "{out}")
    again = ("--without", *OURS, "--out", "{out}/baselines")
    return Step(name, command, seconds, extra, without_ours=() if "--gate-only" in arguments else again)


def _script(name: str, script: str, seconds: float) -> Step:
    return Step(name, ("{python}", f"{{benchmarks}}/{script}", "--device", "{device}", "--out", "{out}"), seconds)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


CEILINGS = Stage(
    "ceilings",
    20,
    [_script("ceilings", "ceilings.py", 120)],
    lambda folder: _json(folder / "ceilings" / "ceilings.json"),
)
DIFFERENCE = Stage(
    "difference",
    200,
    [
        bench("gate", "difference --gate-only --sides fused --set odd resnet18 --dtype float32 bfloat16", 90),
        bench("resnet18", "difference --set resnet18 --orders first --budget 15", 240),
        bench(
            "large",
            "difference --set resnet50 vit_b16 --orders first --budget 10 --sides fused eager foreach floor",
            120,
        ),
        bench("reruns", "difference --gate-only --sides fused --reruns 1000 --orders first both", 60),
        bench("norms", f"difference --gate-only --sides fused --set odd {NORMS}", 240, extra=True),
        bench("bfloat16", "difference --set resnet18 --orders first --dtype bfloat16 --budget 15", 240, extra=True),
        bench("4gib", "difference --set 4gib --orders first --budget 15", 240, extra=True),
        bench("compiled", "difference --set resnet50 vit_b16 --orders first --budget 10", 480, extra=True),
    ],
)
NUCLEAR = Stage(
    "nuclear",
    110,
    [
        bench("gate", "nuclear --gate-only --sides triton", 90),
        bench("resnet18", "nuclear --set resnet18 --budget 20", 240),
        bench("reruns", "nuclear --gate-only --sides triton --reruns 1000", 90),
        bench("resnet50", "nuclear --set resnet50 --budget 20", 300, extra=True),
        bench("vit_b16", "nuclear --set vit_b16 --budget 20", 400, extra=True),
    ],
)
LOW_RANK_CONV = Stage(
    "low_rank_conv",
    170,
    [
        _script("library", "v_convolutions.py", 90),
        bench(
            "gate",
            f"{LOW_RANK} resnet18_cifar --batches 1 8 --scheme channel spatial --gate-only --sides fused",
            120,
        ),
        bench("resnet18", f"{LOW_RANK} resnet18_cifar --batches 128 --budget 3 --without tensorly", 240),
        bench("reruns", f"{LOW_RANK} resnet18_cifar --batches 8 --gate-only --sides fused --reruns 1000", 60),
        bench("resnet50", f"{LOW_RANK} resnet50 --batches 32 --budget 3 --without tensorly", 400, extra=True),
        bench("training", f"{LOW_RANK} resnet18_cifar --batches 128 --budget 3 --pass training", 300, extra=True),
    ],
    lambda folder: _json(folder / "library" / "v_convolutions.json"),
)
STEP = Stage(
    "step",
    120,
    [
        bench("resnet18", "step --set resnet18 --budget 30", 150),
        bench("resnet50", "step --set resnet50 --batch 64 --budget 30", 240),
    ],
)
