"""Speed and memory of smoothk's penalties and low-rank layers against every baseline, in one process, interleaved.

    python benchmarks/bench.py [difference|nuclear|step|low_rank_conv|low_rank_models ...] [--device cpu|cuda]
                               [--set resnet18 resnet50 vit_b16 4gib] [--threads N] [--samples N] [--reruns 1000]
                               [--out DIR]

Each side is compared with a float64 reference first: one that is wrong is printed as red, is not timed, and makes the
exit status 1. What is reported is the ratio of paired samples to the fused side, median and 10th to 90th percentile;
milliseconds are those of this machine on this day. With ``--out`` every case is written as JSON when it is done, and a
figure at the end; ``python benchmarks/tables.py`` puts committed results into the README.

Exit status: 0; 1 where a side was red or a rerun gave other bits; 3 where a side broke the GPU for this process.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import low_rank_speed
import speed
import torch
from entries import difference, low_rank_conv, low_rank_models, nuclear, step
from harness import DeviceLost, Settings, Unavailable, failed, measure
from weight_sets import WEIGHT_SETS, WeightSet

import smoothk
from smoothk.checkpoint import atomic_write
from smoothk.recipes.provenance import stamp

ENTRIES = {entry.NAME: entry for entry in (difference, nuclear, step, low_rank_conv, low_rank_models)}
LOW_RANK = (low_rank_conv.NAME, low_rank_models.NAME)  # they have sets of their own
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in difference.TOLERANCES}
SCHEMA = 1
DEVICE_LOST = 3  # exit status


def build_parser() -> argparse.ArgumentParser:
    """Every option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", nargs="*", metavar="entry", default=[], help=f"of {', '.join(ENTRIES)}; default all")
    parser.add_argument("--set", nargs="+", choices=WEIGHT_SETS, default=["resnet18"], help="weights to run on")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of torch on the CPU; default: torch's own choice")
    parser.add_argument("--samples", type=int, default=20, help="of every side (default 20)")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of sampling for a case (default 60)")
    parser.add_argument("--reruns", type=int, default=0, help="repeat smoothk's kernels and compare the bits")
    parser.add_argument("--gate-only", action="store_true", help="check every side, time none")
    parser.add_argument("--out", type=Path, help="directory for JSON and figures")
    parser.add_argument("--sides", nargs="+", default=[], metavar="PART", help="only sides with PART in their name")
    parser.add_argument("--without", nargs="+", default=[], metavar="PART", help="no sides with PART in it")
    group = parser.add_argument_group("difference")
    group.add_argument("--orders", nargs="+", choices=difference.COEFFICIENTS, default=list(difference.COEFFICIENTS))
    group.add_argument("--norm", nargs="+", choices=("l2", "l1", "l21", "huber"), default=["l2"])
    group.add_argument("--dim", nargs="+", type=_dims, default=[(0,)], help="axes, as in: --dim 0 1 2,3")
    group.add_argument("--normalized", nargs="+", choices=("no", "yes"), default=["no"])
    group.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    group.add_argument("--backend", choices=("cpp", "triton"), help="of the fused sides; default: triton on CUDA")
    group = parser.add_argument_group("step")
    group.add_argument("--batch", type=int, help="images in a step (default 16 on the CPU, 128 on CUDA)")
    low_rank_conv.add_options(parser)
    low_rank_models.add_options(parser)
    return parser


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what was asked for; 1 if a side was red or a rerun differed."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in args.entries:
        if name not in ENTRIES:
            parser.error(f"entry must be one of {', '.join(ENTRIES)}, got {name!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    torch.backends.cudnn.benchmark = args.device == "cuda"  # baselines get the library's best, not its first guess
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    bad = False
    for name in args.entries or ENTRIES:
        low_rank = name in LOW_RANK
        for weight_set in ENTRIES[name].sets(args) if low_rank else [WEIGHT_SETS[given] for given in args.set]:
            for dtype in args.dtype if low_rank or name == difference.NAME else ["float32"]:
                bad |= run(name, weight_set, DTYPES[dtype], args)
        if args.out is not None and not args.gate_only:
            (low_rank_speed if low_rank else speed).draw(args.out, name, args.device)
    return int(bad)


def run(entry: str, weight_set: WeightSet, dtype: torch.dtype, args: argparse.Namespace) -> bool:
    """All cases of one entry on one weight set, printed and written as they are done; whether anything was wrong."""
    device = torch.device(args.device)
    result = describe(entry, weight_set, dtype, args)
    title = f"{entry}, {weight_set.title}, {result['dtype']}, {args.device}"
    settings = Settings(
        samples=args.samples,
        budget=args.budget,
        reruns=args.reruns,
        gate_only=args.gate_only,
        wanted=args.sides,
        unwanted=args.without,
    )
    options = argparse.Namespace(**{**vars(args), "device": device, "dtype": dtype, "weight_set": weight_set})
    options.normalized = [choice == "yes" for choice in args.normalized]
    try:
        for case in ENTRIES[entry].cases(options):
            record = measure(case, settings)
            result["cases"].append(low_rank_speed.compact(record) if entry == low_rank_conv.NAME else record)
            print(f"\n{title}: {record['name']}\n{speed.case_table(record)}", flush=True)
            if args.out is not None:
                write(result, args.out)
    except Unavailable as reason:
        print(f"\n{title}: skipped, {reason}", flush=True)
    except DeviceLost as reason:
        print(f"\n{title}: stopped, the device is lost to this process after {reason}", flush=True)
        raise SystemExit(DEVICE_LOST) from None
    return any(failed(record) for record in result["cases"])


def describe(entry: str, weight_set: WeightSet, dtype: torch.dtype, args: argparse.Namespace) -> dict[str, Any]:
    """A result without cases: what is measured, on what, by which code."""
    info = smoothk.info()
    return {
        "schema": SCHEMA,
        "entry": entry,
        "set": {
            "name": weight_set.name,
            "title": weight_set.title,
            "tensors": len(weight_set.shapes),
            "parameters": weight_set.parameters,
        },
        "device": args.device,
        "dtype": str(dtype).removeprefix("torch."),
        "samples": args.samples,
        "provenance": stamp(),
        "build": {name: info[name] for name in ("cuda", "triton", "extension")},
        "cases": [],
    }


def write(result: Mapping[str, Any], out: Path) -> None:
    """One file for each entry, weight set, device and dtype; what it held of an earlier run is gone."""
    out.mkdir(parents=True, exist_ok=True)
    dtype = "" if result["dtype"] == "float32" else f"-{result['dtype']}"
    path = out / f"{result['entry']}-{result['set']['name']}-{result['device']}{dtype}.json"
    atomic_write(path, json.dumps(result, indent=1).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
