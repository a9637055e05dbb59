"""Everything there is to show on one CUDA GPU, in one command that needs no network.

    python benchmarks/gpu.py --out DIR [--stage NAME ...] [--quick] [--minutes M] [--force] [--data-dir DIR]

Not yet run on a GPU. A checkout will do: the stage ``build`` installs it. The stages, in order of worth:

    build          the extension with the CUDA kernels, without network or package index
    ceilings       copy bandwidth, 8192³ bfloat16 product
    tests          the tests of penalties, polar factors, low-rank convolution, layers and compression on the GPU
    difference     the difference penalty: float64 gate, every baseline, a thousand reruns
    nuclear        the nuclear norm, likewise
    low_rank_conv  the low-rank convolution, likewise, beside the library's first convolution alone
    step           what the penalty adds to a training step of ResNet-18 and ResNet-50
    sanitize       compute-sanitizer: memcheck, racecheck, initcheck, synccheck
    profile        Nsight Compute on the main kernels
    cifar10        the table of CIFAR-10; needs --data-dir

Every command is a process of its own with a time limit, a stage takes at most nine minutes, and none stops the others.
DIR/NAME.json says what became of a stage and on which GPU, driver, versions and commit; started again, the command goes
on behind what was finished with the same code on the same GPU, and so ends what was cut off. ``--quick`` leaves out
what no target but those of training needs; with it all stages from build to step should take about 15 minutes
(``--dry-run --quick`` has the estimates, which are not measured).

Exit status: 0; 1 where a stage or a target failed; 2 without a CUDA GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from gpu_stages import STAGES
from gpu_stages.claims import FAIL, claims_table, judged, verified
from gpu_stages.profiles import profile_table
from gpu_stages.results import results_of
from gpu_stages.stage import FINISHED, SKIPPED, Context, Stage, code_digest, read_record, run_stage

from smoothk.checkpoint import atomic_write
from smoothk.recipes.provenance import stamp
from smoothk.report import Table


def build_parser(stages: Sequence[Stage]) -> argparse.ArgumentParser:
    """Every option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in stages]
    parser.add_argument("--out", type=Path, required=True, help="directory for results, logs and the summary")
    parser.add_argument(
        "--stage", action="append", choices=names, default=[], metavar="NAME", help="run this one; may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="leave out what no target needs")
    parser.add_argument("--minutes", type=float, help="begin nothing after so many, and end what runs then")
    parser.add_argument("--force", action="store_true", help="run what is finished again")
    parser.add_argument("--data-dir", default="", help="directory that holds cifar-10-batches-py, for cifar10")
    parser.add_argument("--commit", help="of this copy, where it is no git checkout")
    parser.add_argument("--summary", action="store_true", help="run nothing, print the summary of --out")
    parser.add_argument("--dry-run", action="store_true", help="run nothing, print the commands and their limits")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the stages out")
    return parser


def main(argv: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    """Run the stages asked for and print the summary."""
    args = build_parser(stages).parse_args(argv)
    wanted = [stage for stage in stages if stage.name in args.stage or not args.stage]
    if args.dry_run:
        print(plan_table(wanted, args.quick))
        return 0
    if args.summary:
        return summarise(args.out, wanted)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"gpu.py needs a CUDA GPU: torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    context = Context(
        out=args.out.resolve(),
        device=args.device,
        machine=machine(args.commit),
        code=code_digest(),
        data=str(Path(args.data_dir).resolve()) if args.data_dir else "",
        quick=args.quick,
        force=args.force,
        deadline=time.monotonic() + 60 * args.minutes if args.minutes is not None else float("inf"),
    )
    for stage in wanted:
        record = run_stage(stage, context)
        print(f"=== {stage.name}: {record['status']}{_because(record)}", flush=True)
    return summarise(context.out, wanted, context)


def machine(commit: str | None) -> dict[str, Any]:
    """GPU, driver, versions and commit."""
    found = stamp()
    driver = capability = None
    if torch.cuda.is_available():
        capability = "{}.{}".format(*torch.cuda.get_device_capability())
        driver = _driver()
    found["machine"] |= {"driver": driver, "capability": capability}
    # Not by `smoothk.info`: the extension must not be loaded in this process when the build writes it anew.
    found["versions"] |= {"cuda": torch.version.cuda, **{name: _version(name) for name in ("triton", "cupy-cuda13x")}}
    if commit is not None:
        found["git"] = {"commit": commit, "dirty": None}
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else None


def plan_table(stages: Sequence[Stage], quick: bool) -> Table:
    """What would run, and for how long at most; with ``--quick`` also how long it may take."""
    rows: list[list[object]] = []
    for stage in stages:
        rows.append([stage.name, "", stage.estimate if quick else None, None])
        steps = [step for step in stage.steps if not (quick and step.extra)]
        rows += [["", step.name, None, step.seconds] for step in steps]
    rows.append(["all", "", sum(stage.estimate for stage in stages) if quick else None, None])
    return Table(["stage", "step", "estimate, s", "limit, s"], rows, {"estimate, s": "g", "limit, s": "g"})


def summarise(out: Path, stages: Sequence[Stage], context: Context | None = None) -> int:
    """Print every claim beside what was measured and write it into summary.json; the exit status."""
    records = {stage.name: record for stage in stages if (record := read_record(out, stage.name)) is not None}
    claims = [entry for entry in judged(out) if entry["stage"] in {stage.name for stage in stages}]
    rows = [[n, r["status"], r.get("seconds"), _because(r).removeprefix(": ")] for n, r in records.items()]
    print(f"\n{Table(['stage', 'status', 'seconds', ''], rows, {'seconds': '.0f'})}")
    profiled = results_of(out, "profile") if "profile" in records else {}
    if profiled:
        print(f"\n{profile_table(profiled)}")
    ceilings = records.get("ceilings", {}).get("results")
    if ceilings:
        tera = (ceilings["copy_bytes_per_second"] / 1e12, ceilings["matmul_flops_per_second"] / 1e12)
        print("\ncopy {:.3f} TB/s read and written, bfloat16 product {:.1f} TFLOP/s".format(*tera))
    if claims:
        print(f"\n{claims_table(claims)}\n\n{verified(judged(out))}")
    others = [name for name, r in records.items() if r["key"]["code"] != (context.code if context else code_digest())]
    if others:
        print(f"\nmeasured with other code than this: {', '.join(others)}")
    if context is not None:
        machines = context.machine
    else:
        machines = next((record["machine"] for record in records.values()), None)
    summary = {"machine": machines, "stages": {n: r["status"] for n, r in records.items()}, "claims": claims}
    if out.is_dir():
        atomic_write(out / "summary.json", json.dumps(summary, indent=1).encode() + b"\n")
    ended = all(record["status"] in (FINISHED, SKIPPED) for record in records.values())
    return int(not ended or any(entry["verdict"] == FAIL for entry in claims))


def _because(record: dict[str, Any]) -> str:
    if "reason" in record:
        return f": {record['reason']}"
    steps = [f"{step['name']} {step['status']}" for step in record["steps"] if step["status"] != FINISHED]
    return f": {', '.join(steps)}" if steps else ""


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and end the command under way
    sys.exit(main())
