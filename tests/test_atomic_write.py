"""Files are written whole or not at all: full disks, directories that are read-only, links, pipes, kills."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_models import perceptron
from torch import nn

from smoothk import load, save
from smoothk.checkpoint import atomic_write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    save(perceptron(), path)
    before = path.read_bytes()
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        save(perceptron(), path)
    monkeypatch.undo()
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    load(perceptron, path)


def test_a_real_full_disk_leaves_nothing_behind(path: Path) -> None:
    """A file-size limit makes the kernel itself refuse the write."""
    script = f"""
import resource, signal, sys
sys.path[:0] = {sys.path!r}
from smoothk.checkpoint import atomic_write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
try:
    atomic_write({str(path)!r}, b"x" * 5000)
except OSError as error:
    print(error.strerror)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "File too large"
    assert list(path.parent.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only directories")
def test_a_read_only_directory(path: Path) -> None:
    save(perceptron(), path)
    before = path.read_bytes()
    path.parent.chmod(0o555)
    try:
        with pytest.raises(PermissionError):
            save(perceptron(), path)
    finally:
        path.parent.chmod(0o755)
    assert path.read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc")
def test_a_directory_that_even_root_cannot_write_to() -> None:
    with pytest.raises(OSError):  # noqa: PT011
        save(perceptron(), "/proc/self/model.safetensors")


def test_a_symbolic_link_stays(path: Path) -> None:
    link = path.parent / "link"
    link.symlink_to(path)  # which is not there yet
    for data in (b"one", b"another"):
        atomic_write(link, data)
        assert link.is_symlink() and path.read_bytes() == data
    assert {*path.parent.iterdir()} == {link, path}


def test_a_link_to_itself_stays(path: Path) -> None:
    path.symlink_to(path)
    with pytest.raises(OSError, match="symbolic links") as error:
        atomic_write(path, b"data")
    assert path.is_symlink() and error.value.filename == str(path)


def test_a_pipe_is_written_to(path: Path) -> None:
    os.mkfifo(path)
    end = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        atomic_write(path, b"data")
        assert os.read(end, 10) == b"data" and path.is_fifo()
    finally:
        os.close(end)


def test_permissions_follow_the_umask(path: Path) -> None:
    mask = os.umask(0o027)
    try:
        atomic_write(path, b"data")
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_kill_while_writing_leaves_a_whole_file(path: Path) -> None:
    """A process that saves over and over is killed at random moments."""
    script = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
import torch
from torch import nn
import smoothk
models = [nn.Linear(600, 600), nn.Linear(600, 600)]
for value, model in enumerate(models):
    nn.init.constant_(model.weight, value), nn.init.constant_(model.bias, value)
print("ready", flush=True)
while True:
    for model in models:
        smoothk.save(model, {str(path)!r})
"""
    rng = random.Random(0)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        while not path.exists():
            time.sleep(0.01)
        for _ in range(30):  # paused at random moments, the file is whole ...
            time.sleep(rng.uniform(0, 0.02))
            process.send_signal(signal.SIGSTOP)
            model = load(lambda: nn.Linear(600, 600), path)
            assert (model.weight == model.bias[0]).all()
            process.send_signal(signal.SIGCONT)
        time.sleep(rng.uniform(0, 0.02))
    finally:
        process.kill()  # ... and after the end
        process.wait()
        process.stdout.close()
    model = load(lambda: nn.Linear(600, 600), path)
    assert (model.weight == model.bias[0]).all()
