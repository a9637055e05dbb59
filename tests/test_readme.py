"""The README's snippets run, and its tables, and those of docs/, are those of the result files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT, blocks, commands, links

README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = blocks(README, "python")


def test_there_is_one_example_for_each_use() -> None:
    for name in ("smoothk.compress(", "SmoothnessPenalty(", "LowRankConv2d.from_conv("):
        assert sum(name in snippet for snippet in SNIPPETS) == 1


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.strip().splitlines()[-1][:40])
def test_snippet_runs(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(("command", "options"), commands(README), ids=[name for name, _ in commands(README)])
def test_commands_and_options_exist(command: str, options: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "smoothk", command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for option in options:
        assert option in done.stdout


def test_tables_are_those_of_the_result_files() -> None:
    check = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_pictures_are_there() -> None:
    pictures = [target for target in links(README) if target.endswith(".png")]
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)
