"""What smoothk is to show on a GPU, from the issues and the page on performance, and whether the files show it."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entries.nuclear import TRITON, TRITON_TF32

from gpu_stages.cifar10 import smallest_drop
from gpu_stages.results import (
    FUSED,
    Reader,
    backend,
    failed_tests,
    identical_reruns,
    largest_error,
    low_rank_mean,
    milliseconds,
    percent_of_copy,
    ratio,
    sanitizer_errors,
    side_number,
    wrong_sides,
)
from gpu_stages.sanitizers import TOOLS
from smoothk import backend as backends
from smoothk.report import Table

PASS, FAIL, MISSING = "pass", "FAIL", "not measured"
_COMPARISONS = {">=": operator.ge, "<=": operator.le, "==": operator.eq}
DIFFERENCE, POLAR, CONV = ("difference_penalty", "triton"), ("polar_factors", "triton"), ("low_rank_conv", "cuda")
Kernel = tuple[str, str]


@dataclass(frozen=True)
class Claim:
    """One figure.

    Args:
        stage: which measures it.
        what: it is.
        target: a comparison and a number, as in ``">= 70"``.
        read: it, from the directory of results.
        verifies: the kernel that has to meet it before `smoothk.backend` may choose it by itself.
    """

    stage: str
    what: str
    target: str
    read: Reader
    verifies: Kernel | None = None

    def verdict(self, measured: float | str | None) -> str:
        """Whether a reading meets the target."""
        if measured is None or (isinstance(measured, str) and measured.startswith("skipped")):
            return MISSING
        if isinstance(measured, str):
            return FAIL
        compare, wanted = self.target.split()
        return PASS if _COMPARISONS[compare](measured, float(wanted)) else FAIL


FIRST, GRAPH = "first order, l2", "first order, l2, CUDA graph"
NUCLEAR = "nuclear norm"
_FUSED, _POLAR = ("fused", "fused, autograd"), (TRITON, TRITON_TF32)


def _difference(what: str, target: str, weights: str, case: str, side: str, number: Any = ratio, **more: Any) -> Claim:
    step = "resnet18" if weights == "resnet18" else "large"
    return Claim("difference", what, target, side_number("difference", step, weights, case, side, number), **more)


def _nuclear(what: str, target: str, side: str, number: Any = ratio, case: str = NUCLEAR, **more: Any) -> Claim:
    return Claim("nuclear", what, target, side_number("nuclear", "resnet18", "resnet18", case, side, number), **more)


def _conv(what: str, target: str, library: str, verifies: Kernel | None = None, **options: Any) -> Claim:
    return Claim("low_rank_conv", what, target, low_rank_mean(library, **options), verifies)


def _step(what: str, weights: str, case: str) -> Claim:
    return Claim("step", what, "<= 1.02", side_number("step", weights, weights, case, "fused", ratio))


def _checks(kernel: Kernel, call: str, stage: str, names: tuple[str, ...], gates: tuple[str, ...]) -> Iterator[Claim]:
    """What makes a kernel right."""
    yield Claim("tests", f"{call}: failing tests", "== 0", failed_tests(call), kernel)
    yield Claim(stage, f"{call}: wrong results", "== 0", wrong_sides(stage, gates, names), kernel)
    same = identical_reruns(stage, "reruns", names)
    yield Claim(stage, f"{call}: reruns with the same bits", ">= 1000", same, kernel)
    for tool in TOOLS:
        yield Claim("sanitize", f"{call}: {tool}", "== 0", sanitizer_errors(tool, call), kernel)


CLAIMS: tuple[Claim, ...] = (
    Claim("build", "CUDA extension loads", "== 1", backend("cuda"), CONV),
    Claim("build", "Triton is there", "== 1", backend("triton")),
    Claim("tests", "layers and compression: failing tests", "== 0", failed_tests("device")),
    Claim("tests", "machine code: failing tests", "== 0", failed_tests("machine_code")),
    *_checks(DIFFERENCE, "difference", "difference", _FUSED, ("gate", "resnet18", "large")),
    *_checks(POLAR, "polar", "nuclear", _POLAR, ("gate", "resnet18")),
    *_checks(CONV, "low_rank_conv", "low_rank_conv", (FUSED,), ("gate", "resnet18")),
    _difference("ResNet-18: % of copy bandwidth", ">= 70", "resnet18", GRAPH, "fused", percent_of_copy),
    _difference("ResNet-50: % of copy bandwidth", ">= 80", "resnet50", GRAPH, "fused", percent_of_copy),
    _difference("ViT-B/16: % of copy bandwidth", ">= 85", "vit_b16", GRAPH, "fused", percent_of_copy),
    _difference("ResNet-18: eager ÷ fused", ">= 20", "resnet18", FIRST, "eager"),
    _difference("ViT-B/16: eager ÷ fused", ">= 7", "vit_b16", FIRST, "eager"),
    _difference("ResNet-18: foreach ÷ fused", ">= 2.8", "resnet18", FIRST, "foreach"),
    _difference("ResNet-18: compile(autograd) ÷ fused", ">= 2.5", "resnet18", FIRST, "compile(autograd)"),
    _difference("ResNet-18: compile(in place) ÷ fused, graphs", ">= 1.2", "resnet18", GRAPH, "compile(in place)"),
    _difference(
        "ResNet-18: default backend ÷ fused", ">= 1", "resnet18", FIRST, "default backend", verifies=DIFFERENCE
    ),
    _nuclear("ResNet-18: milliseconds", "<= 1", TRITON, milliseconds),
    _nuclear("ResNet-18: milliseconds in a graph", "<= 1", TRITON, milliseconds, f"{NUCLEAR}, CUDA graph"),
    _nuclear("ResNet-18: milliseconds, TF32 allowed", "<= 1", TRITON_TF32, milliseconds),
    _nuclear(
        "ResNet-18: milliseconds in a graph, TF32 allowed", "<= 1", TRITON_TF32, milliseconds, f"{NUCLEAR}, CUDA graph"
    ),
    Claim("nuclear", "error of the value", "<= 1e-3", largest_error("nuclear", "gate", _POLAR, ["value"])),
    _nuclear("svd ÷ polar", ">= 100", "svd"),
    _nuclear("eigh ÷ polar", ">= 30", "eigh"),
    _nuclear("CuPy's batched eigh ÷ polar", ">= 4", "cupy syevd"),
    _nuclear("default method ÷ polar", ">= 1", "auto", verifies=POLAR),
    *(
        _conv(f"rank {rank}: pair ÷ fused", f">= {target}", "pair", rank=rank)
        for rank, target in ((16, 1.8), (32, 1.6), (64, 1.25), (128, 1.0))
    ),
    _conv("all layers: pair ÷ fused", ">= 1.35", "pair"),
    _conv("all layers: dense ÷ fused", ">= 1.8", "dense"),
    _conv("all layers: pair ÷ fused, enough to choose it", ">= 1.1", "pair", verifies=CONV),
    Claim("low_rank_conv", "error", "<= 1e-2", largest_error("low_rank_conv", "resnet18", (FUSED,), ["output"])),
    _conv("training: pair ÷ fused", ">= 1.1", "pair", step="training", mode="training", graph=False),
    _conv("training: dense ÷ fused", ">= 1.4", "dense", step="training", mode="training", graph=False),
    _step("ResNet-18, batch 128: with ÷ without penalty", "resnet18", "ResNet-18 training step, batch 128"),
    _step("the same in a graph", "resnet18", "ResNet-18 training step, batch 128, CUDA graph"),
    _step("ResNet-50, batch 64: with ÷ without penalty", "resnet50", "ResNet-50 training step, batch 64"),
    *(
        Claim("cifar10", f"{100 - 100 * keep:.0f} % fewer parameters: points lost{word}", must, read)
        for keep, free, repaired in ((0.3, 0.3, 0.2), (0.2, 1.0, 0.7), (0.1, 4.0, 1.5))
        for word, must, read in (
            ("", f"<= {free}", smallest_drop(keep, "accuracy")),
            (", recalibrated", f"<= {repaired}", smallest_drop(keep, "accuracy_recalibrated")),
        )
    ),
)


def judged(out: Path) -> list[dict[str, Any]]:
    """Every claim with what was measured and the verdict, JSON-able."""
    found = []
    for claim in CLAIMS:
        measured = claim.read(out)
        entry = {"stage": claim.stage, "claim": claim.what, "target": claim.target, "measured": measured}
        verifies = None if claim.verifies is None else list(claim.verifies)
        found.append({**entry, "verdict": claim.verdict(measured), "verifies": verifies})
    return found


def claims_table(found: list[dict[str, Any]]) -> Table:
    """Claim, target, measured, pass or fail."""
    rows = [[e["stage"], e["claim"], e["target"], _shown(e["measured"]), e["verdict"]] for e in found]
    return Table(["stage", "claim", "target", "measured", "verdict"], rows)


def _shown(measured: float | str | None) -> str:
    if isinstance(measured, float | int):
        return f"{measured:.4g}"
    return "" if measured is None else measured[:60]


def verified(found: list[dict[str, Any]]) -> Table:
    """Of every kernel that is not chosen automatically yet, whether it could be, or what is against it."""
    rows = []
    for kernel in sorted(backends.UNVERIFIED):
        needed = [entry for entry in found if entry["verifies"] == list(kernel)]
        against = [f"{e['claim']}: {e['verdict']}" for e in needed if e["verdict"] != PASS]
        more = f" and {len(against) - 3} more" if len(against) > 3 else ""
        answer = "no" if against or not needed else "yes"
        rows.append([*kernel, answer, "; ".join(against[:3]) + more])
    return Table(["operator", "backend", "may leave UNVERIFIED", "because"], rows)
