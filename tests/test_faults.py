"""What goes wrong outside of smoothk: kills, full and read-only disks, altered files. `make faults` does more of it."""

from __future__ import annotations

import ast
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fuzz_files
import pytest
import torch

from smoothk.checkpoint import CheckpointError, atomic_write
from smoothk.cli import main
from smoothk.recipes import train
from smoothk.recipes.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent


def test_killed_training_damages_nothing_and_ends_with_the_same_bits() -> None:
    command = [sys.executable, str(ROOT / "tests" / "kill_training.py"), "6"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert (report["damaged"], report["different"]) == (0, 0), report
    assert report["kills"] == 6 and report["ends"] >= 2 and report["while_writing"] >= 3 and done.returncode == 0


@pytest.mark.parametrize("name", fuzz_files.KINDS)
def test_altered_files_raise_the_documented_error_and_nothing_else(name: str) -> None:
    found = fuzz_files.fuzz(name, 60, seed=1, traced=10)
    assert not found["problems"]
    assert found["refused"] >= 30 and found["refused"] + found["accepted"] == 60


def test_a_size_in_a_runs_configuration_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    fuzz_files.write_run(path)
    description = json.loads(path.read_text())
    description["config"]["width"] = 8.0
    path.write_text(json.dumps(description))
    with fuzz_files.Storages() as storages, pytest.raises(CheckpointError, match="conv1.weight"):
        train.load_run(tmp_path)
    assert storages.largest <= (tmp_path / "model.safetensors").stat().st_size


# --- disks ------------------------------------------------------------------------------------------------------------


@contextmanager
def full_disk() -> Iterator[None]:
    """The kernel refuses every write beyond the first 512 bytes of a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody but root may write to the folder, and nobody is root."""
    paths = [path for path in (folder, *folder.parents) if path.stat().st_uid == os.getuid()]
    modes = {path: path.stat().st_mode & 0o777 for path in paths}
    user = os.geteuid()
    try:
        for path, mode in modes.items():
            path.chmod(mode & ~0o222 | 0o555 if path == folder else mode | 0o055)
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        if user == 0:
            os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)


DISKS = {"full": lambda folder: full_disk(), "read-only": read_only}
REASON = {"full": "File too large", "read-only": "Permission denied"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended."""
    out_dir = tmp_path_factory.mktemp("runs") / "finished"
    train.train(TrainConfig(width=0.25, epochs=1, batch_size=256, out_dir=str(out_dir)), progress=False)
    return out_dir


@pytest.mark.parametrize("disk", DISKS)
@pytest.mark.parametrize("command", ["train", "compress", "plan"])
def test_commands_on_a_bad_disk_say_so_in_one_line_and_leave_every_file(
    disk: str, command: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "target"
    folder.mkdir()
    for name, content in contents(finished).items():
        (folder / name).write_bytes(content)
    (folder / "plan.json").write_text("an older plan")
    arguments, name = {
        "train": (["train", "--resume", "--out-dir", str(folder)], "config.json"),
        "compress": (
            ["compress", str(folder), "--no-evaluate", "--output", str(folder / "model.safetensors")],
            "model.safetensors",
        ),
        "plan": (["compress", str(folder), "--dry-run", "--plan", str(folder / "plan.json")], "plan.json"),
    }[command]
    if command == "train":  # one epoch is left to do
        (folder / "checkpoint.pt").unlink()
    before = contents(folder)
    capsys.readouterr()
    with DISKS[disk](folder):
        assert main([*arguments, "--quiet"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("smoothk: error: [Errno ") and REASON[disk] in captured.err
    assert repr(str(folder / name)) in captured.err
    assert contents(folder) == before


def test_a_disk_that_fills_up_keeps_the_last_checkpoint_from_which_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"width": 0.25, "epochs": 2, "batch_size": 256, "threads": 1}
    epoch = train._Run.epoch

    def filling(self: train._Run, progress: bool) -> None:
        epoch(self, progress)
        if len(self.history) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    settings = TrainConfig(**config, out_dir=str(tmp_path / "run"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        patch.setattr(train._Run, "epoch", filling)
        try:
            with pytest.raises(OSError, match=r"File too large: .*checkpoint\.pt"):
                train.train(settings, progress=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(train.read_state(tmp_path / "run" / "checkpoint.pt").history) == 1
    assert not list((tmp_path / "run").glob(".*"))
    whole = train.train(TrainConfig(**config), progress=False).model.state_dict()
    resumed = train.train(settings, resume=True, progress=False).model.state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def test_a_file_system_without_room(tmp_path: Path) -> None:
    """A real one: 64 KiB, mounted in a name space of its own."""
    script = f"""
import errno, os, sys
sys.path[:0] = {sys.path!r}
from smoothk.checkpoint import atomic_write
os.chdir({str(tmp_path)!r})
atomic_write("file", b"old" * 1000)
try:
    atomic_write("file", b"new" * 40_000)
except OSError as error:
    assert error.errno == errno.ENOSPC, error
    assert open("file").read() == "old" * 1000 and os.listdir() == ["file"]
    print(error)
"""
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    size = f"mount -t tmpfs -o size=64k none {tmp_path}"
    try:
        subprocess.run([*mount, size], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    command = [*mount, f'{size} && exec "$0" -c "$1"', sys.executable, script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "[Errno 28] No space left on device: 'file'\n", done.stderr


def test_errors_of_a_write_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path, error in (("nowhere/file", FileNotFoundError), ("folder", IsADirectoryError)):
        with pytest.raises(error) as caught:
            atomic_write(tmp_path / path, b"data")
        assert str(caught.value).endswith(f": {str(tmp_path / path)!r}")


# --- code in files ----------------------------------------------------------------------------------------------------


class Plant:
    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (os.environ["SMOOTHK_TEST_PLANT"],)


@pytest.mark.parametrize("name", fuzz_files.KINDS)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_planted_pickle_is_never_run(
    name: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOOTHK_TEST_PLANT", str(tmp_path / "grown"))
    kind = fuzz_files.KINDS[name]
    (tmp_path / "file").touch()
    kind.write(tmp_path / "file")
    written = (tmp_path / "file").read_bytes()
    torch.save(Plant(), tmp_path / "torch", pickle_protocol=max(protocol, 2))
    for plant in (pickle.dumps(Plant(), protocol=protocol), (tmp_path / "torch").read_bytes()):
        for content in (plant, written + plant, written[:20] + plant, fuzz_files.MAGIC + plant):
            (tmp_path / "file").write_bytes(content)
            with pytest.raises(kind.error):
                kind.read(tmp_path / "file")
    assert not (tmp_path / "grown").exists()
    pickle.loads(pickle.dumps(Plant(), protocol=protocol))
    assert (tmp_path / "grown").exists(), "the plant has to be a live one"


LOADERS = ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "joblib.load", "dill.load", "marshal.loads")


def sources() -> list[Path]:
    folders = ("smoothk", "kernels", "benchmarks", "tests", "docs", "examples")
    return [ROOT / "setup.py", *(file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")))]


def dangers(source: str) -> list[str]:
    """The calls in a module that can run code from a file, or a text by a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            found += [base for base in map(ast.unparse, node.bases) if base in LOADERS]
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "joblib", "marshal", "torch"):
            found += [f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in LOADERS]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in LOADERS and not (name == "torch.load" and options.get("weights_only") == "True"):
            found.append(name)
        found += [f"{name}({key})" for key in ("allow_pickle", "shell") if options.get(key, "False") != "False"]
    return found


def test_the_search_for_dangers_finds_them() -> None:
    for line in (
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "from torch import load",
        "import pickle; pickle.loads(data)",
        "from pickle import loads",
        "class A(pickle.Unpickler): ...",
        "numpy.load(f, allow_pickle=True)",
        "subprocess.run(line, shell=True)",
    ):
        assert dangers(line), line
    assert not dangers("torch.load(f, weights_only=True); subprocess.run([a]); numpy.load(f)")


def test_no_file_of_the_repository_unpickles_or_asks_a_shell() -> None:
    """But for CIFAR's own files, whose unpickler knows no class, and what a test has pickled itself."""
    files = sources()
    assert len(files) > 100
    found = {str(file.relative_to(ROOT)): dangers(file.read_text()) for file in files}
    assert found.pop("smoothk/recipes/cifar.py") == ["pickle.Unpickler"]
    for name, calls in found.items():
        own = ("pickle.load", "pickle.loads") if name.startswith("tests/") else ()
        assert not [call for call in calls if call not in own], name
