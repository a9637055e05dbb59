"""CIFAR-10: residual networks, plain and with penalties, compressed by every method: the whole table, in stages.

    python benchmarks/cifar10.py --data-dir DIR --out DIR                 # all that is left to do, then the figures
    python benchmarks/cifar10.py --data-dir DIR --out DIR --stage compare:plain:0
    python benchmarks/cifar10.py --preset short ...                       # the whole network, 10 epochs, hours on a CPU
    python benchmarks/cifar10.py --preset full ...                        # the whole network; needs a GPU

A stage is `train:NAME:SEED`, `compare:NAME:SEED`, `latency:NAME:SEED` or `report`. It takes up what an earlier call
left, stops before ``--budget`` seconds are over, and the exit code says whether more is to do: 0 done, 3 more to do, 1
failed, 2 not possible here. A run lives in ``--out``/NAME-SEED, results in ``benchmarks/results/cifar10-PRESET``. A
result file belongs to one set of weights, one commit and one set of versions; another starts it afresh.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cifar10_report
import torch
from timing import interleave, spread

from smoothk.checkpoint import atomic_write
from smoothk.recipes import data, figures
from smoothk.recipes.compare import Comparison, Network, compare, merge
from smoothk.recipes.config import FREE_FIELDS, PRECISIONS, TrainConfig
from smoothk.recipes.methods import METHODS
from smoothk.recipes.provenance import stamp
from smoothk.recipes.train import load_dataset, load_run, train

DONE, FAILED, IMPOSSIBLE, MORE = 0, 1, 2, 3
NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "first": {"first_order": 1e-3},
    "second": {"second_order": 3e-4},
    "nuclear-mild": {"nuclear": 1e-4, "unfolding": "spatial"},
    "nuclear": {"nuclear": 2e-4, "unfolding": "spatial"},
    # Trained Rank Pruning: its truncation, and its nuclear norm, which is that of the channel unfolding.
    "trp": {"nuclear": 2e-4, "unfolding": "channel", "truncate_every": 20},
}
KEEPS = (0.3, 0.2, 0.15, 0.1, 0.05)
TIMED = ("svd", "l1-filters", "folding")
BATCHES = (1, 64)
IMAGE = (3, 32, 32)


@dataclass(frozen=True)
class Preset:
    """A network and its training."""

    title: str
    recipe: dict[str, Any]
    networks: dict[str, dict[str, Any]] = field(default_factory=dict)  # those of `NETWORKS` that have other doses here

    @property
    def device(self) -> str:
        """Where it is trained and measured."""
        return self.recipe.get("device", "cpu")


PRESETS = {
    "small": Preset(
        "CIFAR-10, small ResNet-18",
        {
            "data": "cifar10",
            "arch": "resnet18",
            "width": 0.375,
            "stem_stride": 2,
            "epochs": 8,
            "batch_size": 128,
            "lr": 0.2,
            "warmup": 0.2,
            "crop_padding": 2,
            "flip": "alternating",
            "precision": "bf16",
            "nuclear_every": 8,  # a third of the time; on held-out images no difference beyond noise
            "threads": 1,
        },
        # Of several, measured on a tenth of the training images: what loses least at 10 % kept with dense above 81 %.
        {"plain": {"weight_decay": 2e-3}, "nuclear": {"nuclear": 4e-4}},
    ),
    "short": Preset(
        "CIFAR-10, ResNet-18, 10 epochs",
        {
            "data": "cifar10",
            "arch": "resnet18",
            "epochs": 10,
            "batch_size": 128,
            "lr": 0.1,  # 0.2 and the small network's weight decay underfit: 85.7 % in 8 epochs
            "warmup": 0.2,
            "crop_padding": 2,
            "flip": "alternating",
            "precision": "bf16",
            "channels_last": True,  # 1.3 times as fast, with AMX
            "nuclear_every": 8,
            "threads": 1,
        },
        # Learning rate times dose times steps as in the small network: none was chosen on this one.
        {"nuclear": {"nuclear": 6e-4}},
    ),
    "full": Preset(
        "CIFAR-10, ResNet-18",
        {
            "data": "cifar10",
            "arch": "resnet18",
            "epochs": 60,
            "batch_size": 256,
            "lr": 0.4,
            "warmup": 0.2,
            "flip": "alternating",
            "precision": "bf16",
            "compile": True,
            "device": "cuda",
            "checkpoint_every": 10,
        },
    ),
}


class Stages:
    """The stages of one call, and the time it has."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.preset = PRESETS[args.preset]
        self.results: Path = args.results or cifar10_report.RESULTS / f"cifar10-{args.preset}"
        self.results.mkdir(parents=True, exist_ok=True)
        self.started = time.perf_counter()

    @property
    def left(self) -> float:
        """Seconds that remain."""
        return self.args.budget - (time.perf_counter() - self.started)

    def run(self, stage: str) -> bool:
        """Do what is left of a stage; whether it is done."""
        if stage == "report":
            self.report()
            return True
        kind, name, seed = stage.split(":")
        return getattr(self, kind)(name, int(seed))

    def config(self, name: str, seed: int) -> TrainConfig:
        out_dir = str(self.args.out / f"{name}-{seed}")
        dose = {**NETWORKS[name], **self.preset.networks.get(name, {})}
        options = {**self.preset.recipe, **dose, "data_dir": self.args.data_dir}
        if self.args.precision:
            options["precision"] = self.args.precision
        return TrainConfig(**options, seed=seed, out_dir=out_dir)

    def is_trained(self, name: str, seed: int) -> bool:
        return (self.args.out / f"{name}-{seed}" / "model.safetensors").exists()

    def train(self, name: str, seed: int) -> bool:
        """Train, from where it stopped."""
        return self.is_trained(name, seed) or train(self.config(name, seed), resume=True, seconds=self.left).finished

    def network(self, name: str, seed: int) -> Network:
        """A finished run.

        Raises:
            ValueError: it was trained by another recipe.
        """
        expected = self.config(name, seed)
        model, config = load_run(expected.out_dir)
        for key, value in expected.to_json().items():
            if key not in FREE_FIELDS | {"threads"} and getattr(config, key) != value:
                preset, got = self.args.preset, getattr(config, key)
                raise ValueError(f"{expected.out_dir}: {key} must be {value!r} in preset {preset!r}, got {got!r}")
        return Network(name, model.to(self.preset.device), config)

    def compare(self, name: str, seed: int) -> bool:
        """Every method that the result file has not yet; it is written after each."""
        network, path = self.network(name, seed), self.results / f"{name}-{seed}.json"
        weights = (self.args.out / f"{name}-{seed}" / "model.safetensors").read_bytes()
        digest = hashlib.sha256(weights).hexdigest()
        found = Comparison.from_json(path.read_text()) if path.exists() else None
        if found is not None and not (found.recipe.get("weights_sha256") == digest and _is_ours(found.provenance)):
            found = None
        measured = {row.method for row in found.rows} if found else set()
        dataset = load_dataset(self.config(name, seed)).to(self.preset.device)
        longest = 0.0
        for method in (m for m in self.args.methods if m not in measured):
            if longest > max(self.left, 0.0):  # the first is always measured, so that every call gets on
                return False
            before = time.perf_counter()
            part = compare([network], dataset, KEEPS, [method], title=self.preset.title, progress=False)
            part = replace(part, recipe={**part.recipe, "weights_sha256": digest})
            if self.args.data_note:
                part = replace(part, data={**part.data, "note": self.args.data_note})
            found = replace(merge([found, part]), provenance=found.provenance) if found else part
            atomic_write(path, found.to_json().encode() + b"\n")
            seconds = time.perf_counter() - before
            longest = max(longest, seconds)
            print(f"{name}, seed {seed}: {METHODS[method].label}, {seconds:.0f} s", file=sys.stderr, flush=True)
        return True

    def latency(self, name: str, seed: int) -> bool:
        """Forward passes of the dense network and of compressed ones, interleaved; needs a quiet machine."""
        network, device = self.network(name, seed), torch.device(self.preset.device)
        dataset = load_dataset(self.config(name, seed))
        batches = data.calibration_batches(dataset, 500)
        sides = {("dense", 1.0): network.model.eval()}
        for method in TIMED:
            compress = METHODS[method].prepare(network.model, batches)
            sides |= {(method, keep): compress(keep).eval() for keep in KEEPS}
        rows = []
        with torch.inference_mode():
            for batch in BATCHES:
                x = torch.randn(batch, *IMAGE, device=device)
                runs = {key: lambda model=model, x=x: model(x) for key, model in sides.items()}
                taken = interleave(runs, device, samples=30, budget=self.left / 2 / len(BATCHES))
                for (method, keep), samples in taken.items():
                    milliseconds = {k: round(1e3 * v, 4) for k, v in spread(samples.seconds).items()}
                    rows.append({"method": method, "keep": keep, "batch": batch, "milliseconds": milliseconds})
        content = {"network": name, "seed": seed, "rows": rows, "provenance": stamp()}
        (self.results / "latency").mkdir(exist_ok=True)
        atomic_write(self.results / "latency" / f"{name}-{seed}.json", json.dumps(content, indent=1).encode() + b"\n")
        return True

    def report(self) -> None:
        """Figures of the weights of finished runs, then those of the result files."""
        models = {}
        for name in self.args.networks:
            if self.is_trained(name, self.args.seeds[0]):
                network = self.network(name, self.args.seeds[0])
                models[network.label] = network.model.cpu()
        if models:
            figures.singular_values(models, self.results / "singular_values.png", unfolding="spatial")
            figures.weight_rows(models, self.results / "weight_rows.png", layer="layers.2.0.conv2")
        cifar10_report.draw(self.results)


def _is_ours(provenance: dict[str, Any]) -> bool:
    """Whether a result file is of this commit and these versions. A day may pass, and results may be uncommitted."""
    ours = stamp()
    commits = [(source["git"] or {}).get("commit") for source in (provenance, ours)]
    return commits[0] == commits[1] and provenance["versions"] == ours["versions"]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--data-dir", required=True, help="directory that holds cifar-10-batches-py")
    parser.add_argument("--data-note", help="what the images are, where they are not the original files")
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs, one sub-directory each")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: the preset's, which is bf16")
    parser.add_argument("--results", type=Path, help="directory for results and figures")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["plain", "nuclear"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--stage", help="one of the above; default: train, compare and report for all of the above")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds (default: %(default)g)")
    args = parser.parse_args(argv)
    if args.stage is None:
        pairs = [(name, seed) for seed in args.seeds for name in args.networks]
        args.stages = [f"{kind}:{name}:{seed}" for kind in ("train", "compare") for name, seed in pairs] + ["report"]
        return args
    kind, *where = args.stage.split(":")
    is_valid = len(where) == 2 and where[0] in NETWORKS and where[1].isdigit()
    if args.stage != "report" and not (kind in ("train", "compare", "latency") and is_valid):
        parser.error(f"--stage must be (train|compare|latency):NAME:SEED or report, got {args.stage!r}")
    args.stages = [args.stage]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run stages until they are done or the time is over; the exit code."""
    args = parse(argv)
    device = PRESETS[args.preset].device
    if device == "cuda" and not torch.cuda.is_available():
        print(f"cifar10.py: preset {args.preset!r} needs a CUDA GPU; --preset small runs on a CPU", file=sys.stderr)
        return IMPOSSIBLE
    stages = Stages(args)
    try:
        for stage in args.stages:
            if stages.left <= 0 or not stages.run(stage):
                print(f"cifar10.py: more to do from {stage} on", file=sys.stderr)
                return MORE
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"cifar10.py: {error}", file=sys.stderr)
        return FAILED
    return DONE


if __name__ == "__main__":
    raise SystemExit(main())
