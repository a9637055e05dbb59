"""Feeds altered files to everything that reads one: only the documented exception may come of it.

``python tests/fuzz_files.py COUNT [SEED]`` alters COUNT files, as bytes and, with every checksum made right again, in
their contents, and prints JSON: for each kind of file how many were accepted (an altered title is a title), how many
refused, and the problems, of which there have to be none: another exception, an attempt to allocate what is not
there, or more memory than a small multiple of the file.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import struct
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from smoothk import CheckpointError, RankPlan, compress, factorize, load, plan_ranks, save
from smoothk.checkpoint import _digest
from smoothk.recipes.compare import Comparison, Row
from smoothk.recipes.config import TrainConfig
from smoothk.recipes.run_state import MAGIC, RunState, optimizer_state, read_state, restore, write_state
from smoothk.recipes.train import build_model, load_run

FACTOR, CONSTANT = 100, 1 << 20  # bytes allowed: for each one of the file, and for what does not grow with it
NUMBERS = (-1, 0, 1, 7, 2**31, 2**63, 10**30, 0.5, -0.5, float("nan"), float("inf"))
ODD = (None, True, *NUMBERS, "", "x", "dense", [], {}, [[]])


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 12), nn.Linear(12, 8))


def altered_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flipped bits, overwritten, removed and repeated pieces, a part only."""
    mutant, length = bytearray(data), rng.choice([1, 1, 2, 8, 100])
    # Headers are a small part of a file, and the most interesting one.
    at = rng.randrange(rng.choice([len(data), min(len(data), 400)]))
    match rng.randrange(6):
        case 0:
            mutant[at] ^= 1 << rng.randrange(8)
        case 1:
            mutant[at : at + length] = rng.randbytes(length)
        case 2:
            del mutant[at : at + length]
        case 3:
            mutant[at:at] = mutant[at : at + length]
        case 4:
            del mutant[at:]
        case 5:
            mutant[at : at + length] = rng.choice([b"\xff", b"0", b"9", b"[", b"\0"]) * length
    return bytes(mutant)


def altered_json(value: Any, rng: random.Random) -> Any:
    """A copy with one entry, somewhere, replaced, removed, added, or wrapped."""
    copy = json.loads(json.dumps(value))
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            places.append((node, key))
            visit(node[key])

    visit(copy)
    if not places:
        return rng.choice(ODD)
    node, key = rng.choice(places)
    match rng.randrange(5):
        case 0 | 1:
            node[key] = rng.choice(ODD)
        case 2:
            del node[key]
        case 3:
            node[key] = [node[key]] if rng.random() < 0.5 else {"x": node[key]}
        case 4:
            other, place = rng.choice(places)
            node[key] = json.loads(json.dumps(other[place])) if place in other or isinstance(other, list) else None
    return copy


def altered_text(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.02:
        return rng.choice([b"[" * 200_000, b'{"rows":' * 50_000, b"9" * 5000, b'"' + b"x" * 10_000, b"\xff\xfe"])
    return json.dumps(altered_json(json.loads(data), rng)).encode()


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join_safetensors(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def altered_safetensors(data: bytes, key: str, rng: random.Random) -> bytes:
    """Another header, of the tensors or of ours, or another body."""
    header, body = split_safetensors(data)
    ours = json.loads(header["__metadata__"][key])
    match rng.randrange(4):
        case 0:
            header = altered_json(header, rng)
        case 1:
            body = altered_bytes(body, rng)
        case _:
            header["__metadata__"][key] = json.dumps(altered_json(ours, rng))
    return join_safetensors(header, body)


def altered_model(data: bytes, rng: random.Random) -> bytes:
    """The digest is made right again, where there is still something to take it of."""
    import safetensors.torch

    mutant = altered_safetensors(data, "smoothk", rng)
    try:
        header, body = split_safetensors(mutant)
        ours = json.loads(header["__metadata__"]["smoothk"])
        ours["sha256"] = _digest(ours, safetensors.torch.load(mutant))
        header["__metadata__"]["smoothk"] = json.dumps(ours)
        return join_safetensors(header, body)
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError, AttributeError):
        return mutant


def altered_checkpoint(data: bytes, rng: random.Random) -> bytes:
    payload = altered_safetensors(data[len(MAGIC) + 32 :], "smoothk-run", rng)
    return MAGIC + hashlib.sha256(payload).digest() + payload


@dataclass(frozen=True)
class Kind:
    """A file, what reads it and uses what it has read, what that may raise, and how its contents are altered."""

    write: Callable[[Path], object]
    read: Callable[[Path], object]
    error: type[Exception]
    alter: Callable[[bytes, random.Random], bytes]


RUN = TrainConfig(width=0.25, epochs=1)


def write_checkpoint(path: Path) -> None:
    model = build_model(RUN, 10, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    record = dict.fromkeys(("epoch", "lr", "loss", "penalty", "train_accuracy", "test_accuracy", "seconds"), 1.0)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"optimizer.{name}": value for name, value in optimizer_state(model, optimizer).items()}
    write_state(path, RunState(RUN.to_json(), {"name": "x"}, [record], {**tensors, "rng.cpu": torch.get_rng_state()}))


def read_checkpoint(path: Path) -> None:
    state, model = read_state(path), build_model(RUN, 10, 1)
    with torch.random.fork_rng(devices=[]):
        try:
            restore(state, model, torch.optim.SGD(model.parameters(), 0.1), torch.device("cpu"))
        except ValueError as error:  # which `train` turns into this
            raise CheckpointError(str(error)) from error


def write_run(path: Path) -> None:
    save(build_model(RUN, 10, 1), path.parent / "model.safetensors")
    path.write_text(json.dumps({"config": RUN.to_json(), "num_classes": 10, "in_channels": 1, "classes": ["a"]}))


def read_run(path: Path) -> None:
    (path.parent / "config.json").write_bytes(path.read_bytes())
    load_run(path.parent)


def write_results(path: Path) -> None:
    rows = [Row("plain", "none", 0, "svd", keep, 100, 200, 90.0, 10, 20, 80.0, 85.0, 0.1) for keep in (0.1, 0.2)]
    rows.append(Row("plain", "none", 0, "svd-uniform", 0.01, 100, 200, 90.0, note="unreachable"))
    path.write_text(Comparison("title", {"name": "digits"}, 10, {"epochs": 1}, {"git": None}, tuple(rows)).to_json())


def text_of(path: Path) -> str:
    """What is no text reaches neither `from_json`."""
    return path.read_bytes().decode(errors="replace")


def read_results(path: Path) -> None:
    comparison = Comparison.from_json(text_of(path))
    str(comparison.overview()), str(comparison.table()), comparison.rows_table().to_csv()


def read_plan(path: Path) -> None:
    plan = RankPlan.from_json(text_of(path))
    str(plan), factorize(network(), plan)


KINDS = {
    "model": Kind(
        lambda path: save(compress(network(), 0.7).model, path),
        lambda path: load(network, path),
        CheckpointError,
        altered_model,
    ),
    "plan": Kind(
        lambda path: path.write_text(plan_ranks(network(), 0.7).to_json()), read_plan, ValueError, altered_text
    ),
    "checkpoint": Kind(write_checkpoint, read_checkpoint, CheckpointError, altered_checkpoint),
    "run": Kind(write_run, read_run, CheckpointError, altered_text),
    "results": Kind(write_results, read_results, ValueError, altered_text),
}


class Storages(TorchDispatchMode):
    """Bytes of the largest tensor that an operator makes, and their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                self.largest = max(self.largest, value.untyped_storage().nbytes())
        return result


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an allocation failed somewhere behind an error."""
    while error is not None:
        if isinstance(error, MemoryError) or re.search("allocate|out of memory", str(error), re.IGNORECASE):
            return True
        error = error.__cause__ or error.__context__
    return False


def fuzz(name: str, count: int, seed: int = 0, *, traced: int = 200) -> dict[str, Any]:
    """Alter one kind of file ``count`` times; Python's own memory is traced for the first ``traced`` of them."""
    kind, rng = KINDS[name], random.Random(f"{name} {seed}")
    found = {"accepted": 0, "refused": 0, "problems": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.file"
        kind.write(path)
        data = path.read_bytes()
        with Storages():  # torch loads much more at the first of these
            kind.read(path)  # as it was written it is right, and everything that is loaded once is loaded
        for i in range(count):
            mutant = kind.alter(data, rng) if i % 2 else altered_bytes(data, rng)
            path.write_bytes(mutant)
            allowed = FACTOR * max(len(mutant), len(data)) + CONSTANT
            problem, storages = None, Storages()
            if i < traced:
                tracemalloc.start()
            try:
                with storages:
                    kind.read(path)
                found["accepted"] += 1
            except Exception as error:
                found["refused"] += 1
                if type(error) is not kind.error:
                    problem = f"{type(error).__name__}: {error}"
                elif out_of_memory(error):
                    problem = f"tried to allocate too much: {error}"
            if i < traced:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                if peak > allowed:
                    problem = f"{peak} bytes of Python objects for a file of {len(mutant)}"
            if storages.largest > allowed:
                problem = f"a tensor of {storages.largest} bytes for a file of {len(mutant)}"
            if problem:
                found["problems"].append(f"{i}: {problem[:300]}")
    return found


def address_space() -> int:
    """The most that this process has had, in bytes."""
    return int(re.search(r"VmPeak:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


def main(count: int, seed: int = 0) -> dict[str, Any]:
    torch.set_num_threads(1)
    for name in KINDS:
        fuzz(name, 20, seed)  # what is loaded once is loaded
    before = address_space()
    report: dict[str, Any] = {name: fuzz(name, -(-count // len(KINDS)), seed) for name in KINDS}
    return {**report, "files": count, "address_space_growth_mb": round((address_space() - before) / 1e6)}


if __name__ == "__main__":
    found = main(*map(int, sys.argv[1:]))
    print(json.dumps(found, indent=1))
    sys.exit(any(found[name]["problems"] for name in KINDS))
