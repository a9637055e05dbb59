"""Kills training with SIGKILL at random moments, every second time as a checkpoint is being written, resumes it, and
counts what is not as it has to be.

``python tests/kill_training.py COUNT [SEED]`` prints JSON: the kills, how many of them hit a write (its temporary file
is left), damaged files found, runs that reached their end, and those whose model differs in a bit from that of a run
that nobody disturbed. Exit code 1 unless the last and the damaged files are 0.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # forked processes have no thread pool

from torch import nn

from smoothk.checkpoint import CheckpointError, load
from smoothk.recipes import data
from smoothk.recipes.run_state import read_state
from smoothk.recipes.train import TrainConfig, train

EPOCHS = 5
LONGEST = 0.6  # of the time that a whole run takes, until a kill


def dropout_net(num_classes: int, in_channels: int) -> nn.Module:
    """A quick network whose training depends on the state of the global random number generator."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(in_channels * 64, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, num_classes)
    )


def config(out_dir: Path) -> TrainConfig:
    return TrainConfig(
        model="kill_training:dropout_net",
        epochs=EPOCHS,
        batch_size=256,
        first_order=1e-4,
        threads=1,
        out_dir=str(out_dir),
    )


def start(out_dir: Path) -> int:
    """Resume the run in a process of its own, a copy of this one: nothing has to be imported again."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        train(config(out_dir), resume=True, progress=False)
        code = 0
    finally:
        os._exit(code)


def wait(rng: random.Random, child: int, out_dir: Path, longest: float, *, writing: bool) -> None:
    """Until a random moment or, after the next write of a checkpoint has begun, a random moment in it."""
    if not writing:
        time.sleep(rng.uniform(0, longest))
        return
    while not any(out_dir.glob(".checkpoint.pt.*.tmp")):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.0002)
    time.sleep(rng.uniform(0, 0.001))


def damaged(out_dir: Path) -> list[str]:
    """The files of a run that cannot be read."""
    found = []
    readers = {
        "checkpoint.pt": read_state,
        "config.json": lambda path: TrainConfig.from_json(json.loads(path.read_text())["config"]),
        "history.json": lambda path: json.loads(path.read_text()),
        "model.safetensors": lambda path: load(lambda: dropout_net(10, 1), path),
    }
    for name, read in readers.items():
        try:
            if (out_dir / name).exists():
                read(out_dir / name)
        except (CheckpointError, ValueError, KeyError) as error:
            found.append(f"{name}: {error}")
    return found


def main(count: int, seed: int = 0) -> dict[str, object]:
    rng, folder = random.Random(seed), Path(tempfile.mkdtemp(prefix="smoothk-kills-"))
    data.load("digits")  # once, for all the processes
    started = time.monotonic()
    os.waitpid(start(folder / "whole"), 0)
    longest = LONGEST * (time.monotonic() - started)
    expected = (folder / "whole" / "model.safetensors").read_bytes()
    kills = while_writing = ends = different = 0
    problems: list[str] = []
    out_dir = folder / "run"
    while kills < count:
        leftovers = set(out_dir.glob(".*.tmp"))
        child = start(out_dir)
        wait(rng, child, out_dir, longest, writing=kills % 2 == 1)
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == -signal.SIGKILL:
            kills += 1
            while_writing += not leftovers.issuperset(out_dir.glob(".*.tmp"))
            problems += damaged(out_dir)
            if kills < count:
                continue
            code = os.waitstatus_to_exitcode(os.waitpid(start(out_dir), 0)[1])  # the last run goes on to its end
        ends += 1
        if code != 0 or (out_dir / "model.safetensors").read_bytes() != expected or any(out_dir.glob(".*.tmp")):
            different += 1
        shutil.rmtree(out_dir)
    shutil.rmtree(folder)
    return {
        "kills": kills,
        "while_writing": while_writing,
        "damaged": len(problems),
        "ends": ends,
        "different": different,
        "problems": problems[:5],
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    report = main(*map(int, sys.argv[1:]))
    print(json.dumps(report))
    sys.exit(bool(report["damaged"] or report["different"]))
