"""CIFAR-10 on two cores: a small ResNet-18, plain and with each penalty, compressed by every method.

    python benchmarks/cifar10.py --data-dir DIR --out DIR [--networks plain nuclear] [--seeds 0 1 2]

Runs that are in ``--out`` already are taken as they are, unfinished ones are resumed. Results and figures go to
``benchmarks/results/cifar10-small``; ``python benchmarks/tables.py`` puts them into the README.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from torch import nn

from smoothk.checkpoint import atomic_write
from smoothk.recipes import figures
from smoothk.recipes.compare import Comparison, Network, compare, merge
from smoothk.recipes.config import TrainConfig
from smoothk.recipes.train import load_run, train

RESULTS = Path(__file__).resolve().parent / "results" / "cifar10-small"
RECIPE = {
    "data": "cifar10",
    "arch": "resnet18",
    "width": 0.375,
    "stem_stride": 2,
    "epochs": 8,
    "batch_size": 256,
    "lr": 0.4,
    "warmup": 0.2,
    "precision": "bf16",
    "threads": 1,
}
NETWORKS = {
    "plain": {},
    "first": {"first_order": 1e-3},
    "second": {"second_order": 3e-4},
    "nuclear-mild": {"nuclear": 1e-4, "unfolding": "spatial"},
    "nuclear": {"nuclear": 2e-4, "unfolding": "spatial"},
}
KEEPS = (0.3, 0.15, 0.1)
METHODS = ("svd", "svd-spatial", "svd-uniform", "l1-weights", "l1-filters")


def main() -> None:
    """Train what is missing, compare each network, write results and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="directory that holds cifar-10-batches-py")
    parser.add_argument("--data-note", help="what the images are, where they are not the original files")
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs, one sub-directory each")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for results and figures")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in args.networks:
            measure(name, seed, args)
    draw_networks(args.out, args.results)
    comparison = read_results(args.results)
    atomic_write(args.results / "rows.csv", comparison.rows_table().to_csv().encode())
    figures.accuracy(comparison, args.results / "accuracy.png", methods=("svd",), lowest=70)
    figures.accuracy(comparison, args.results / "methods.png", methods=[m for m in METHODS if m != "svd-spatial"])


def run_directory(out: Path, name: str, seed: int) -> Path:
    """Where a run lives."""
    return out / (f"{name}-{seed}" if seed else name)


def measure(name: str, seed: int, args: argparse.Namespace) -> None:
    """Train or find one network, compare every method on it, and write the result file."""
    out_dir = str(run_directory(args.out, name, seed))
    result = train(
        TrainConfig(**RECIPE, **NETWORKS[name], seed=seed, data_dir=args.data_dir, out_dir=out_dir), resume=True
    )
    network = Network(name, result.model, result.config)
    comparison = compare([network], result.dataset, KEEPS, METHODS, title="CIFAR-10, small ResNet-18")
    if args.data_note:
        comparison = replace(comparison, data={**comparison.data, "note": args.data_note})
    atomic_write(args.results / f"{name}-{seed}.json", comparison.to_json().encode() + b"\n")


def draw_networks(out: Path, results: Path) -> None:
    """Figures of the weights of every finished run with seed 0."""
    models: dict[str, nn.Module] = {}
    for name in NETWORKS:
        run = run_directory(out, name, 0)
        if (run / "model.safetensors").exists():
            network = Network(name, *load_run(run))
            models[network.label] = network.model
    if models:
        figures.singular_values(models, results / "singular_values.png", unfolding="spatial")
        figures.weight_rows(models, results / "weight_rows.png", layer="layers.2.0.conv2")


def read_results(directory: Path) -> Comparison:
    """All result files of a directory as one comparison, networks in the order of `NETWORKS`."""
    parts = [Comparison.from_json(path.read_text()) for path in sorted(directory.glob("*.json"))]
    order = {name: index for index, name in enumerate(NETWORKS)}
    return merge(sorted(parts, key=lambda part: (order[part.rows[0].network], part.rows[0].seed)))


if __name__ == "__main__":
    main()
