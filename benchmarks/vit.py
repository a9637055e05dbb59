"""A small vision transformer on CIFAR-10, plain and with the nuclear norm, compressed by SVD without fine-tuning.

    python benchmarks/vit.py --data-dir DIR --out DIR [--stem-stride 1] [--epochs 30] [--threads 2]

Linear layers only: queries, keys and values are one of them, with a joint factor. Every dose in `NETWORKS` is reported,
none is chosen. There is no batch norm, so that both accuracies of a row are one. Runs in ``--out`` are taken up where
they stopped. Results go to ``benchmarks/results/vit``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from smoothk.checkpoint import atomic_write
from smoothk.recipes.compare import Comparison, Network, compare, merge
from smoothk.recipes.config import PRECISIONS, TrainConfig
from smoothk.recipes.train import train

RESULTS = Path(__file__).resolve().parent / "results" / "vit"
RECIPE = {
    "data": "cifar10",
    "arch": "vit",
    "batch_size": 128,
    "optimizer": "adamw",
    "lr": 2e-3,
    "weight_decay": 0.05,
    "warmup": 0.2,
    "channels_last": False,
}
NETWORKS = {"plain": {}, "nuclear": {"nuclear": 1e-3}, "nuclear-mild": {"nuclear": 3e-4}}
KEEPS = (0.5, 0.3, 0.2, 0.15)
METHODS = ("svd", "svd-uniform")


def main() -> None:
    """Train what is missing, compress it, write results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="directory that holds cifar-10-batches-py")
    parser.add_argument("--data-note", help="what the images are, where they are not the original files")
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs, one sub-directory each")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--stem-stride", type=int, default=2, help="1: patches of 4x4 pixels, 2: of 8x8")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for results")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in args.networks:
            measure(name, seed, args)
    parts = [Comparison.from_json(path.read_text()) for path in sorted(args.results.glob("*.json"))]
    order = {name: index for index, name in enumerate(NETWORKS)}
    comparison = merge(sorted(parts, key=lambda part: (order[part.rows[0].network], part.rows[0].seed)))
    atomic_write(args.results / "results.md", (comparison.overview().to_markdown() + "\n").encode())


def measure(name: str, seed: int, args: argparse.Namespace) -> None:
    """Train or find one network, compress it, and write the result file."""
    options = {field: getattr(args, field) for field in ("epochs", "stem_stride", "precision", "threads")}
    out_dir = str(args.out / f"{name}-{seed}")
    config = TrainConfig(**RECIPE, **NETWORKS[name], **options, seed=seed, data_dir=args.data_dir, out_dir=out_dir)
    result = train(config, resume=True)
    network = Network(name, result.model, result.config)
    title = f"CIFAR-10, vision transformer, patches of {4 * args.stem_stride}"
    comparison = compare([network], result.dataset, KEEPS, METHODS, title=title)
    if args.data_note:
        comparison = replace(comparison, data={**comparison.data, "note": args.data_note})
    atomic_write(args.results / f"{name}-{seed}.json", comparison.to_json().encode() + b"\n")


if __name__ == "__main__":
    main()
