"""What a stage of `gpu.py` is, and how one runs so that nothing that it does reaches the next.

A stage is a list of commands, each a process of its own with a time limit. After every command the stage's record,
``DIR/NAME.json``, is written anew, so that a run that is cut off loses one command, and the next run goes on behind it.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smoothk.checkpoint import atomic_write

HERE = Path(__file__).resolve().parent.parent
ROOT = HERE.parent
SCHEMA = 1
STAGE_SECONDS = 540.0
LEAST_SECONDS = 15.0  # with less left no command is started
DEVICE_LOST = 3  # exit status of `bench.py`
SHOWN_LINES = 12  # of the output of a command that failed
SOURCES = ("smoothk", "kernels", "csrc", "benchmarks", "tests", "setup.py", "CMakeLists.txt", "pyproject.toml")
SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh", ".toml", ".txt"}
FINISHED, FAILED, TIMEOUT, CUT, SKIPPED = "finished", "failed", "timeout", "cut off", "skipped"

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """One command.

    Args:
        name: of the sub-folder for its files.
        command: words in which `Context.filled` puts places and options for ``{python}``, ``{out}`` and so on.
        seconds: after which it is killed, with everything that it started.
        extra: left out by ``--quick``.
        environment: further variables.
        unfinished: exit status that says that the command has to be called again.
        without_ours: words to add for a second run where the first one broke the device: baselines are worth having.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    extra: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    unfinished: int | None = None
    without_ours: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """A list of steps.

    Args:
        name: of the record.
        estimate: seconds that it may take with ``--quick``, by reckoning: no GPU has run it yet.
        steps: what to run.
        collect: reads what the steps left in the stage's folder into JSON-able results.
        obstacle: why it cannot run with these options, or None.
    """

    name: str
    estimate: float
    steps: Sequence[Step]
    collect: Callable[[Path], dict[str, Any]] = lambda folder: {}
    obstacle: Callable[[Context], str | None] = lambda context: None


@dataclass(frozen=True)
class Context:
    """What the stages of one run share."""

    out: Path
    device: str
    machine: Record  # GPU, driver, versions, commit: stamped into every record
    code: str  # `code_digest`
    data: str = ""
    quick: bool = False
    force: bool = False
    deadline: float = float("inf")  # of `time.monotonic`

    @property
    def key(self) -> dict[str, Any]:
        """What has to be the same for results of an earlier run to count."""
        machine, versions = (self.machine.get(part, {}) for part in ("machine", "versions"))
        where = {"gpu": machine.get("gpu"), "driver": machine.get("driver"), "versions": versions}
        return {"code": self.code, "device": self.device, **where}

    def filled(self, words: Sequence[str], out: Path) -> list[str]:
        """Words of a command with everything filled in."""
        places = {"python": sys.executable, "benchmarks": HERE, "tests": ROOT / "tests", "root": ROOT, "out": out}
        build = "cuda" if self.device == "cuda" else "cpu"
        architecture = self.machine.get("machine", {}).get("capability") or ""
        names = {"device": self.device, "data": self.data, "build": build, "architecture": architecture}
        return [word.format(**places, **names) for word in words]

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


def code_digest(root: Path = ROOT) -> str:
    """Of the sources that results depend on; a copied working tree has no commit."""
    digest = hashlib.sha256()
    for name in SOURCES:
        top = root / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.suffix in SUFFIXES and path.is_file():
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def run_stage(stage: Stage, context: Context) -> dict[str, Any]:
    """Run what an earlier run has not finished, and return the record."""
    path, folder = context.out / f"{stage.name}.json", context.out / stage.name
    known = read_record(context.out, stage.name)
    if known is not None and (context.force or known["key"] != context.key):
        discard(known, folder)
        known = None
    done = {step["name"]: step for step in known["steps"] if step["status"] == FINISHED} if known else {}
    steps = [step for step in stage.steps if not (step.extra and context.quick)]
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "stage": stage.name,
        "status": FINISHED,
        "key": context.key,
        "machine": context.machine,
        "steps": [entry for name, entry in done.items() if name not in {step.name for step in steps}],
        "results": {},
        "files": known["files"] if known else [],
    }
    obstacle = stage.obstacle(context)
    if obstacle is not None:
        record |= {"status": SKIPPED, "reason": obstacle}
        return _write(record, path)
    start = time.monotonic()
    for number, step in enumerate(steps):
        if step.name in done:
            record["steps"].append(done[step.name])
            continue
        limit = min(step.seconds, STAGE_SECONDS - (time.monotonic() - start), context.left())
        title = f"{stage.name} {number + 1}/{len(steps)}: {step.name}"
        if limit < min(LEAST_SECONDS, step.seconds):
            print(f"=== {title}: no time left", flush=True)
            record["steps"].append({"name": step.name, "status": CUT, "seconds": 0.0})
        else:
            print(f"=== {title} (at most {limit:.0f} s)", flush=True)
            record["steps"].append(_run_step(step, context, folder, limit))
        _summarise(stage, record, folder)
        _write(record, path)
    _summarise(stage, record, folder)
    return _write(record, path)


def read_record(out: Path, name: str) -> dict[str, Any] | None:
    """The record of a stage, None where there is none that can be read."""
    try:
        record = json.loads((out / f"{name}.json").read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("schema") == SCHEMA else None


def discard(record: Record, folder: Path) -> None:
    """Remove the files of a record: those of other code must not be read as this one's."""
    for name in record["files"]:
        (folder / name).unlink(missing_ok=True)


def _run_step(step: Step, context: Context, folder: Path, limit: float) -> dict[str, Any]:
    out = folder / step.name
    out.mkdir(parents=True, exist_ok=True)
    words = context.filled(step.command, out)
    start = time.monotonic()
    log = out / "log.txt"
    environment = dict(zip(step.environment, context.filled([*step.environment.values()], out), strict=True))
    status = call(words, limit, log, environment)
    entry: dict[str, Any] = {"name": step.name, "command": _shown(words, context), "exit": status}
    states = {None: TIMEOUT, 0: FINISHED} | ({} if step.unfinished is None else {step.unfinished: CUT})
    entry["status"] = states.get(status, FAILED)
    if status != 0:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_LINES:])
        print(f"{last}\n--- {step.name}: {_why(status, limit)}; all of it in {log}", flush=True)
    broken = status is None or status < 0 or status == DEVICE_LOST
    if broken and step.without_ours and context.left() > LEAST_SECONDS:
        again = [*words, *context.filled(step.without_ours, out)]
        entry["baselines_exit"] = call(again, min(limit, context.left()), out / "baselines.txt", environment)
    entry["seconds"] = round(time.monotonic() - start, 1)
    return entry


def _why(status: int | None, limit: float) -> str:
    return f"killed after {limit:.0f} s" if status is None else f"exit status {status}"


def _shown(words: Sequence[str], context: Context) -> str:
    """A command without the places of this machine."""
    text = " ".join(Path(w).name if w.startswith(str(HERE)) or w == sys.executable else w for w in words)
    return text.replace(str(context.out), "DIR").replace(str(ROOT), ".")


def call(words: Sequence[str], seconds: float, log: Path, environment: Mapping[str, str] | None = None) -> int | None:
    """Exit status of a command, its output in ``log``; None if it was killed, with all it started, at its limit."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "LC_ALL": "C.UTF-8", **(environment or {})}
    with open(log, "w") as file:
        try:
            process = subprocess.Popen(
                words, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            file.write(f"{error}\n")
            return 127
        try:
            return process.wait(seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return None
            raise


def _summarise(stage: Stage, record: dict[str, Any], folder: Path) -> None:
    """Status and results of the steps so far."""
    states = [step["status"] for step in record["steps"]]
    record["status"] = next((state for state in (FAILED, TIMEOUT, CUT) if state in states), FINISHED)
    record["seconds"] = round(sum(step["seconds"] for step in record["steps"]), 1)
    found = (path for step in stage.steps for path in (folder / step.name).rglob("*") if path.is_file())
    record["files"] = sorted(str(path.relative_to(folder)) for path in found)
    try:
        record["results"] = stage.collect(folder)
        record.pop("reason", None)
    except Exception as error:  # whatever a tool wrote: the other stages go on
        record |= {"status": FAILED, "reason": f"its output cannot be read: {type(error).__name__}: {error}"}


def _write(record: dict[str, Any], path: Path) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(record, indent=1).encode() + b"\n")
    return record
