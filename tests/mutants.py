"""Faults planted in the code, one at a time, each of which the tests named beside it have to find.

``python tests/mutants.py [WORD ...]`` plants, in a copy of the checkout, all those of `mutants.txt` or those whose
names contain a word; those in C++ are compiled. The same tests have to pass without the fault. Exit code 1 unless every
one is found.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch  # noqa: F401 -- once, for all the processes
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


CRASHES = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)
MUTANTS = read(Path(__file__).with_suffix(".txt"))


def find(mutant: Mutant, checkout: Path, objects: Path) -> tuple[bool, str]:
    """Whether the tests find it, and what pytest says."""
    text = mutant.plant(checkout)
    try:
        if mutant.compiled:
            tree.build(checkout, objects, "-O1")
        code, lines = run_tests(checkout, mutant.tests)
    finally:
        (checkout / mutant.file).write_text(text)
    # A crash finds it as well; nothing run, a file that cannot be imported, or no end before the alarm does not.
    found = -code in CRASHES or (code == pytest.ExitCode.TESTS_FAILED and not re.search(r"\d errors?\b", lines[-1]))
    return found, lines[-1]


def run_tests(checkout: Path, tests: str) -> tuple[int, list[str]]:
    """Exit code, negative for a signal, and output of pytest in a copy of this process, which has torch already."""
    options = ["-W", "error", "-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider"]
    files, *words = tests.split(" -k ")
    options += [str(checkout / "tests" / name) for name in files.split()] + [f"-k{word}" for word in words]
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if not child:
            code = 70
            try:
                os.chdir(checkout)
                os.environ.update(tree.environment(checkout))
                sys.path[:0] = [str(checkout)]
                sys.dont_write_bytecode = True
                for stream in (1, 2):
                    os.dup2(output.fileno(), stream)
                signal.alarm(900)
                code = int(pytest.main([*options, "--rootdir", str(checkout)]))
                sys.stdout.flush()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return code, output.read().strip().splitlines() or [f"no output, exit code {code}"]


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    missed, sound = [], {}  # by tests: whether they pass without a fault
    with tempfile.TemporaryDirectory(prefix="smoothk-mutants-") as folder:
        checkout, objects = tree.copy(Path(folder) / "tree"), Path(folder) / "objects"
        for mutant in sorted(chosen, key=lambda m: m.compiled):
            started = time.monotonic()
            found, line = find(mutant, checkout, objects)
            seconds = time.monotonic() - started
            control = (mutant.compiled, mutant.tests)
            if found and control not in sound:
                if mutant.compiled:  # as the fault was built
                    tree.build(checkout, objects, "-O1")
                code, lines = run_tests(checkout, mutant.tests)
                sound[control] = code == pytest.ExitCode.OK
                line += "" if sound[control] else f"; without it: {lines[-1]}"
            found = found and sound[control]
            print(f"{'found ' if found else 'MISSED'} {mutant.name} ({seconds:.0f} s): {line}", flush=True)
            missed += [] if found else [mutant.name]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} planted faults found; missed: {', '.join(missed) or 'none'}")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
