"""The measured tables of the README and of ``docs/``, docs/results.md and its figures, from ``benchmarks/results``.

    python benchmarks/tables.py            # rewrites them
    python benchmarks/tables.py --check    # exits 1 if a text has drifted; looks at no figure

In the README a table lies between ``<!-- table: NAME -->`` and ``<!-- end -->``; `TABLES` says what a name stands for.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import crepe_report
import implicit_report
import low_rank_speed
import speed
import vit_report
from cifar10_report import DIRECTORIES, by_method, by_network, caption, draw, page, read_results
from gpu_stages.claims import claims_table
from gpu_stages.results import over_fused

from smoothk.recipes.compare import Comparison
from smoothk.report import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GPU = "h200"  # folder of what `gpu.py --out` wrote
# of docs/results.md, behind CIFAR-10's
CHAPTERS = {"crepe": crepe_report.chapter, "vit": vit_report.chapter, "implicit": implicit_report.chapter}
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(name: str) -> Comparison:
    """The one result file of a benchmark."""
    return Comparison.from_json((RESULTS / name / "results.json").read_text())


def _networks(comparison: Comparison) -> str:
    return f"{by_network(comparison).to_markdown()}\n\n{caption(comparison)}"


def _gpu(entry: str, step: str, table: Callable[[Sequence[speed.Record]], Table], dtype: str = "float32") -> str:
    """A table of one step of `gpu.py`; nothing as long as no GPU has run it."""
    results = speed.read(RESULTS / GPU / entry / step, entry, "cuda", dtype)
    measured = [result for result in results if any(speed.timed(case) for case in result["cases"])]
    return f"{table(measured).to_markdown()}\n\n{speed.provenance(measured)}." if measured else ""


def _gpu_claims() -> str:
    """Every target beside what a GPU showed."""
    path = RESULTS / GPU / "summary.json"
    if not path.exists():
        return ""
    summary = json.loads(path.read_text())
    machine, versions = summary["machine"]["machine"], summary["machine"]["versions"]
    note = f"{machine['gpu']}, driver {machine['driver']}, torch {versions['torch']}, Triton {versions['triton']}"
    return f"{claims_table(summary['claims']).to_markdown()}\n\n{note}, {summary['machine']['date']}."


def low_rank_gpu_table(results: Sequence[speed.Record]) -> Table:
    """Layer by layer, what the library takes over the CUDA kernel, both in channels last and replayed by graphs."""
    rows = [
        [case["options"]["layer"], case["options"]["rank"], case["options"]["batch"], *ratios]
        for result in results
        for case in result["cases"]
        if case["options"].get("graph") and None not in (ratios := [over_fused(case, n) for n in ("dense", "pair")])
    ]
    heads = ["dense ÷ smoothk", "pair ÷ smoothk"]
    return Table(["layer", "rank", "batch", *heads], rows, dict.fromkeys(heads, ".2f"))


def _speed(entry: str, table: Callable[[Sequence[speed.Record]], Table], note: str) -> str:
    results = speed.read(RESULTS / "speed", entry, "cpu")
    return f"{table(results).to_markdown()}\n\n{note} {speed.provenance(results)}."


DIFFERENCE_NOTE = (
    "Value and gradient into `.grad` of all conv and linear weights, l2; median of paired, interleaved samples (10th "
    "to 90th percentile). The milliseconds are those of the machine. In its own process a side allocates as in a "
    "script, where temporaries come from fresh memory."
)
NUCLEAR_NOTE = (
    "Value and gradient of all layers; errors against float64, the largest over random weights and over spectra with "
    "slow decay, a small tail, zeros and repeated singular values."
)
STEP_NOTE = (
    "ResNet-18 on 32×32 images, SGD, forward to optimizer; last column: the penalty alone, after a backward pass."
)
LOW_RANK_CONV_NOTE = (
    "Geometric means over the layers of ResNet-18 (32×32 and 224×224), ResNet-50 and VGG-16, each shape once, without "
    "their first: median of paired, interleaved samples. Best: of dense, pair and merged. TensorLy-Torch's is another "
    "factorisation of the same size, Tucker with 1×1, k×k, 1×1."
)
LOW_RANK_MODELS_NOTE = (
    "Inference without gradients, and forward and backward in training; median of paired, interleaved samples. Pair: "
    "every low-rank layer as two library convolutions. Folded: batch norm folded into the convolution before it by "
    "torch. Memory: what one call allocates beside weights and input."
)

FLOOR_NOTE = (
    "Bytes: what one call has to read and write. The floor is `grad.add_(w)`, which moves the same; GB/s are the fused "
    "side's bytes over its median time. Extra memory: the most that one call holds beside weights and gradients."
)

TABLES: dict[str, Callable[[], str]] = {
    "cifar10-networks": lambda: _networks(read_results(RESULTS / "cifar10-small")),
    "cifar10-methods": lambda: by_method(read_results(RESULTS / "cifar10-small"), "plain").to_markdown(),
    "crepe": lambda: crepe_report.summary(RESULTS / "crepe"),
    "digits": lambda: _networks(read("digits")),
    "speed-difference": lambda: _speed("difference", speed.difference_table, DIFFERENCE_NOTE),
    "speed-nuclear": lambda: _speed("nuclear", speed.nuclear_table, NUCLEAR_NOTE),
    "speed-step": lambda: _speed("step", speed.step_table, STEP_NOTE),
    "speed-low-rank-conv": lambda: _speed("low_rank_conv", low_rank_speed.layer_table, LOW_RANK_CONV_NOTE),
    "speed-files": lambda: speed.files_table(RESULTS / "speed").to_markdown(),
    "speed-floors": lambda: _speed("difference", speed.floor_table, FLOOR_NOTE),
    "speed-low-rank-targets": lambda: low_rank_speed.targets(RESULTS / "speed").to_markdown(),
    "gpu-claims": _gpu_claims,
    "gpu-difference": lambda: _gpu("difference", "resnet18", speed.difference_table),
    "gpu-nuclear": lambda: _gpu("nuclear", "resnet18", speed.nuclear_table),
    "gpu-step": lambda: _gpu("step", "resnet18", speed.step_table),
    "gpu-low-rank-conv": lambda: _gpu("low_rank_conv", "resnet18", low_rank_gpu_table, "bfloat16"),
    "speed-low-rank-models": lambda: _speed("low_rank_models", low_rank_speed.model_table, LOW_RANK_MODELS_NOTE),
}


def fill(text: str) -> str:
    """``text`` with every marked table made anew."""
    return MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite texts and figures, or check the texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a text has drifted")
    args = parser.parse_args(argv)
    if not args.check:
        for name in DIRECTORIES:
            if (RESULTS / name).exists():
                draw(RESULTS / name)
    results = ROOT / "docs" / "results.md"
    texts = {path: fill(path.read_text(encoding="utf-8")) for path in PAGES if path != results}
    texts[results] = page([chapter(RESULTS / name) for name, chapter in CHAPTERS.items() if (RESULTS / name).exists()])
    drifted = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if args.check and drifted:
        names = ", ".join(path.name for path in drifted)
        print(f"{names}: not what benchmarks/results say; run python benchmarks/tables.py", file=sys.stderr)
        return 1
    for path in drifted:
        path.write_text(texts[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
