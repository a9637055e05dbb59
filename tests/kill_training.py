"""Kills training with SIGKILL at random moments, every second time as a checkpoint is being written, resumes it, and
counts what is not as it has to be.

So that no busy machine is too late for a write, the process waits for its kill before the file gets its name.

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
MOST = 4  # kills of one run, then it goes on to its end


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


def stop_before_rename(event: str, args: tuple[object, ...]) -> None:
    """An audit hook: the process stops where a checkpoint is written, but not yet in its place."""
    if event == "os.rename" and Path(str(args[1])).name == "checkpoint.pt":
        os.kill(os.getpid(), signal.SIGSTOP)


def start(out_dir: Path, *, writing: bool = False) -> int:
    """Resume the run in a process of its own, a copy of this one: nothing has to be imported again."""
    child = os.fork()
    if child:
        return child
    if writing:
        sys.addaudithook(stop_before_rename)
    code = 1
    try:
        train(config(out_dir), resume=True, progress=False)
        code = 0
    finally:
        os._exit(code)


def wait_for_write(rng: random.Random, child: int, out_dir: Path, leftovers: set[Path]) -> None:
    """Until a random moment of the next write of a checkpoint, or the end of the run."""
    while leftovers.issuperset(out_dir.glob(".checkpoint.pt.*.tmp")):
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
        leftovers, writing = set(out_dir.glob(".*.tmp")), kills % 2 == 1
        child = start(out_dir, writing=writing)
        if writing:
            wait_for_write(rng, child, out_dir, leftovers)
        else:
            time.sleep(rng.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == -signal.SIGKILL:
            kills += 1
            while_writing += not leftovers.issuperset(out_dir.glob(".*.tmp"))
            problems += damaged(out_dir)
            if kills < count and kills % MOST:
                continue
            code = os.waitstatus_to_exitcode(os.waitpid(start(out_dir), 0)[1])
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
