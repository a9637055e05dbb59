"""What a low-rank kernel has to beat: the library's convolutions on the layers that the targets are set for.

    python benchmarks/v_convolutions.py --out DIR [--device cpu|cuda]

For a square 3x3 layer at a quarter of its channels as rank: the dense convolution, the first of the pair alone (v,
which reads every input once per tap), and the pair, in bfloat16 and channels last, beside a copy that moves the bytes
of a fused kernel's input and output. Where the pair is near that, no kernel can gain much.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from conv_networks import ConvLayer
from timing import Run, copy, interleave, spread
from torch import Tensor
from torch.nn import functional as F

from smoothk.checkpoint import atomic_write
from smoothk.recipes.provenance import stamp
from smoothk.report import Table

LAYERS = tuple(ConvLayer(channels, channels, 3, 1, 2048 // channels) for channels in (64, 128, 256, 512))
SAMPLES, BUDGET = 20, 5.0


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write v_convolutions.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, help="default 128 on CUDA, 1 on the CPU")
    parser.add_argument("--out", type=Path, required=True, help="directory for v_convolutions.json")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    batch = args.batch or (128 if args.device == "cuda" else 1)
    torch.backends.cudnn.benchmark = True
    layers = [measure(layer, batch, device) for layer in LAYERS]
    columns = list(layers[0])
    print(Table(columns, [list(layer.values()) for layer in layers], dict.fromkeys(columns[4:], ".4f")))
    result = {"device": args.device, "layers": layers, "provenance": stamp()}
    args.out.mkdir(parents=True, exist_ok=True)
    atomic_write(args.out / "v_convolutions.json", json.dumps(result, indent=1).encode() + b"\n")


def measure(layer: ConvLayer, batch: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of each side for one layer, and of a copy of a fused kernel's bytes."""
    rank = layer.out_channels // 4
    x, w, v, u = (
        torch.randn(shape, device=device).to(torch.bfloat16).to(memory_format=torch.channels_last)
        for shape in (
            (batch, layer.in_channels, layer.size, layer.size),
            layer.shape,
            (rank, layer.in_channels, layer.kernel, layer.kernel),
            (layer.out_channels, rank, 1, 1),
        )
    )

    def first() -> Tensor:
        return F.conv2d(x, v, None, layer.stride, layer.padding)

    moved = 2 * (x.numel() + batch * layer.out_channels * layer.out_size**2)  # bytes of input and output
    runs: dict[str, Run] = {
        "dense": lambda: F.conv2d(x, w, None, layer.stride, layer.padding),
        "v": first,
        "pair": lambda: F.conv2d(first(), u),
        "copy of the bytes": copy(device, moved // 2),  # each is read once or written once
    }
    with torch.inference_mode():
        samples = interleave(runs, device, samples=SAMPLES, budget=BUDGET)
    milliseconds = {f"{name}, ms": 1e3 * spread(found.seconds)["median"] for name, found in samples.items()}
    return {"layer": layer.name, "rank": rank, "batch": batch, "bytes": moved, **milliseconds}


if __name__ == "__main__":
    main()
