"""The examples run as a user runs them: the losses of one process in every framework, on any number of processes."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torchvision_operators

from smoothk import SmoothnessPenalty

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TOLERANCE = 1e-6  # relative, of every loss and penalty
SECONDS = 300  # importing transformers in four processes on two busy cores

Record = dict[int, tuple[float, ...]]  # loss and, where it is printed, penalty, by step


def run(name: str, *arguments: object, processes: int = 0, gpus: bool = False) -> Record:
    """Run an example, under torchrun if ``processes``; returns what it printed of each step."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"] if processes else []
    command = [sys.executable, *launcher, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    path = [EXAMPLES.parent, *([torchvision_operators.AT_START] if torchvision_operators.missing() else [])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **({"NVIDIA_TF32_OVERRIDE": "0"} if gpus else {"CUDA_VISIBLE_DEVICES": ""}),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    aborted_at_exit = processes and "terminate called without an active exception" in done.stderr  # pytorch#179291
    assert done.returncode == 0 or aborted_at_exit, done.stdout[-2000:] + done.stderr[-4000:]
    lines = re.findall(r"^step (\d+)  loss (\S+)(?:  penalty (\S+))?$", done.stdout, re.MULTILINE)
    assert len(lines) == len({step for step, *_ in lines}), done.stdout
    return {int(step): tuple(float(value) for value in values if value) for step, *values in lines}


@pytest.fixture(scope="module")
def on_one_process() -> Callable[[], Record]:
    return cache(lambda: run("plain"))


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    yield importlib.import_module("task")
    del sys.modules["task"]


def by_autograd(task: ModuleType, clip: float | None = None, **penalty: float) -> Record:
    """The losses of the whole batch, the penalty a term of the loss."""
    model = task.build_model()
    optimizer = task.build_optimizer(model)
    penalise = SmoothnessPenalty(model, **{**task.PENALTY, **penalty})
    record = {}
    for step in range(task.STEPS):
        x, labels = task.batch(step)
        optimizer.zero_grad()
        loss, value = torch.nn.functional.cross_entropy(model(x), labels), penalise()
        (loss + value).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        record[step] = loss.item(), value.item()
    return record


def difference(one: Record, other: Record) -> float:
    """Largest relative difference of the losses and penalties that both have."""
    assert one and one.keys() <= other.keys()
    pairs = [pair for step in one for pair in zip(one[step], other[step], strict=False)]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def assert_same(one: Record, other: Record, tolerance: float = TOLERANCE) -> None:
    largest = difference(one, other)
    print(f"largest relative difference {largest:.2e}")
    assert largest <= tolerance


def test_plain(on_one_process: Callable[[], Record], task: ModuleType) -> None:
    assert len(on_one_process()) == task.STEPS
    assert_same(on_one_process(), by_autograd(task))
    # A penalty left out, or doubled, shows.
    for wrong in ({"first_order": 0.0}, {"nuclear": 0.0}, {"first_order": 2 * task.PENALTY["first_order"]}):
        losses = {step: (loss,) for step, (loss, _) in by_autograd(task, **wrong).items()}
        assert difference(losses, on_one_process()) > 20 * TOLERANCE


CASES = [
    pytest.param(name, package, processes, marks=[] if (name, processes) == ("fsdp", 2) else pytest.mark.slow)
    for name, package, several in (
        ("ddp", None, (1, 2, 4)),
        ("fsdp", None, (1, 2, 4)),
        ("lightning_trainer", "lightning", (0, 2)),
        ("transformers_trainer", "transformers", (0, 2)),
        ("accelerate_loop", "accelerate", (0, 2)),
    )
    for processes in several
]


@pytest.mark.parametrize(("name", "package", "processes"), CASES)
def test_same_losses_as_one_process(
    name: str, package: str | None, processes: int, on_one_process: Callable[[], Record]
) -> None:
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; pip install smoothk[full]")
    record = run(name, processes=processes)
    assert record.keys() == on_one_process().keys()
    assert_same(record, on_one_process())


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 1)])
def test_resume_on_another_number_of_processes(
    before: int, after: int, on_one_process: Callable[[], Record], tmp_path: Path
) -> None:
    first = run("fsdp", "--folder", tmp_path, "--steps", 3, processes=before)
    unfinished = tmp_path / "step-7"  # what a crash leaves has no .metadata
    unfinished.mkdir()
    second = run("fsdp", "--folder", tmp_path, processes=after)
    assert (list(first), list(second)) == ([0, 1, 2], [3, 4, 5, 6, 7])
    assert_same(first | second, on_one_process())


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 3])
def test_accumulated_and_clipped(parts: int, task: ModuleType) -> None:
    record = run("mixed_precision", "--dtype", "float32", "--parts", parts)
    clipped = by_autograd(task, clip=0.3)
    assert difference(clipped, by_autograd(task)) > 20 * TOLERANCE
    assert_same(record, clipped)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 1e-3), ("float16", 5e-4)])
def test_mixed_precision(dtype: str, tolerance: float, task: ModuleType) -> None:
    assert_same(run("mixed_precision", "--dtype", dtype), by_autograd(task, clip=0.3), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_nccl(name: str) -> None:
    assert_same(run(name, processes=2, gpus=True), run("plain", gpus=True))
