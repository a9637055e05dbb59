"""What the device can do at best: bandwidth of a copy and rate of a bfloat16 product, into DIR/ceilings.json.

python benchmarks/ceilings.py --out DIR [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from timing import Run, copy, interleave, spread

from smoothk.checkpoint import atomic_write
from smoothk.recipes.provenance import stamp


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="directory for ceilings.json")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    size, side = (2 << 30, 8192) if args.device == "cuda" else (64 << 20, 512)
    result = {
        "device": args.device,
        "copy_bytes": size,
        "copy_bytes_per_second": 2 * size / _seconds(copy(device, size), device),
        "matmul_size": side,
        "matmul_flops_per_second": 2 * side**3 / _seconds(_matmul(device, side), device),
        "provenance": stamp(),
    }
    print(f"copy {result['copy_bytes_per_second'] / 1e12:.3f} TB/s read and written, ", end="")
    print(f"bfloat16 product {result['matmul_flops_per_second'] / 1e12:.1f} TFLOP/s")
    args.out.mkdir(parents=True, exist_ok=True)
    atomic_write(args.out / "ceilings.json", json.dumps(result, indent=1).encode() + b"\n")


def _matmul(device: torch.device, side: int) -> Run:
    a, b, out = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


def _seconds(run: Run, device: torch.device) -> float:
    return spread(interleave({"run": run}, device, samples=20, budget=20)["run"].seconds)["median"]


if __name__ == "__main__":
    main()
