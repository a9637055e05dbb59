"""Faults planted in the code, one at a time, each of which the tests named beside it have to find.

``python tests/mutants.py [WORD ...]`` plants, in a copy of the checkout, all those of `mutants.txt` or those whose
names contain a word; those in C++ are compiled. Exit code 1 unless every one is found.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tree


@dataclass(frozen=True)
class Mutant:
    """``old``, which is in ``file`` once, becomes ``new``; one of ``tests`` (arguments of pytest) fails then."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def compiled(self) -> bool:
        return self.file.startswith("csrc/")

    def plant(self, root: Path) -> str:
        """Change the file below ``root``; returns what it was."""
        text = (root / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} has {text.count(self.old)} times {self.old!r}")
        (root / self.file).write_text(text.replace(self.old, self.new))
        return text


def read(path: Path) -> list[Mutant]:
    """The planted faults of a file, five lines each; see there."""
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    found = []
    for record in text.strip().split("\n\n"):
        name, file, *marked = record.split("\n")
        if [line[:1] for line in marked] != ["-", "+", "="]:
            raise ValueError(f"{path}: {name!r} must be name, file and lines that start with -, + and =")
        found.append(Mutant(name, file, *(line[2:] for line in marked)))
    return found


MUTANTS = read(Path(__file__).with_suffix(".txt"))


def find(mutant: Mutant, checkout: Path, objects: Path) -> tuple[bool, str]:
    """Whether the tests find it, and what pytest says."""
    text = mutant.plant(checkout)
    try:
        if mutant.compiled:
            tree.build(checkout, objects, "-O1")
        first, *rest = mutant.tests.split(" -k ")
        tests = [str(checkout / "tests" / name) for name in first.split()] + [f"-k{word}" for word in rest]
        command = [sys.executable, "-m", "pytest", "-W", "error", "-x", "-q", "--no-header", "--tb=line", *tests]
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider"],
            cwd=checkout,
            env=tree.environment(checkout),
            capture_output=True,
            text=True,
            timeout=900,
        )
    finally:
        (checkout / mutant.file).write_text(text)
    # A crash finds it as well; nothing run, or a file that cannot be imported, does not.
    found = done.returncode in (1, -6, -11) and "error" not in done.stdout.rpartition("\n")[2]
    return found, (done.stdout.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    missed = []
    with tempfile.TemporaryDirectory(prefix="smoothk-mutants-") as folder:
        checkout, objects = tree.copy(Path(folder) / "tree"), Path(folder) / "objects"
        module = checkout / "smoothk" / tree.MODULE
        built = module.read_bytes() if module.exists() else None
        for mutant in sorted(chosen, key=lambda m: m.compiled):
            started = time.monotonic()
            found, line = find(mutant, checkout, objects)
            seconds = time.monotonic() - started
            print(f"{'found ' if found else 'MISSED'} {mutant.name} ({seconds:.0f} s): {line}", flush=True)
            missed += [] if found else [mutant.name]
            if mutant.compiled and built is not None:
                module.write_bytes(built)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} planted faults found; missed: {', '.join(missed) or 'none'}")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
