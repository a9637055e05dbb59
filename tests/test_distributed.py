"""Weights on several processes: what every process finds in `distributed_worker.py`, and the arithmetic of the cuts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no torch.distributed with gloo", allow_module_level=True)

from distributed_worker import CHECKS  # noqa: E402

from smoothk.halo import Cut, neighbours  # noqa: E402

TESTS = Path(__file__).resolve().parent
SECONDS = 100

Results = list[dict[str, str]]  # of every rank, by check


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Results]:
    """Runs all checks on that many processes, once."""
    return cache(lambda world: run_checks(world, tmp_path_factory.mktemp(f"on{world}")))


def run_checks(world: int, folder: Path) -> Results:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    logs = [folder / f"{rank}.log" for rank in range(world)]
    workers: list[subprocess.Popen] = []
    deadline = time.monotonic() + SECONDS
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, "-W", "error", TESTS / "distributed_worker.py", str(rank), str(world), folder]
            with log.open("w") as output:
                workers.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
        for worker in workers:
            worker.wait(max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        pass  # what is missing then fails by name
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    found = []
    for rank, log in enumerate(logs):
        missing = f"did not run on rank {rank}: an earlier check failed or hung\n{log.read_text()[-2000:]}"
        file = folder / f"{rank}.json"
        found.append(dict.fromkeys(CHECKS, missing) | (json.loads(file.read_text()) if file.exists() else {}))
    return found


@pytest.mark.parametrize(
    ("check", "world"), [(name, world) for name, (_, worlds) in CHECKS.items() for world in worlds]
)
def test_on_several_processes(results: Callable[[int], Results], check: str, world: int) -> None:
    outcomes = [of_rank[check] for of_rank in results(world)]
    for outcome in sorted(outcomes, key=lambda text: text.startswith("did not run")):
        if outcome.startswith("skipped"):
            pytest.skip(outcome)
        assert outcome == "ok", outcome


@given(size=st.integers(2, 40), parts=st.integers(2, 9), order=st.sampled_from((1, 2)))
def test_every_difference_is_counted_once_and_reaches_every_rank_it_touches(size: int, parts: int, order: int) -> None:
    def differences(start: int, stop: int) -> list[range]:
        """The rows of every difference within these."""
        return [range(i, i + order + 1) for i in range(start, stop - order)]

    ranks = [Cut(0, size, parts, rank) for rank in range(parts)]
    chunks = torch.arange(size).chunk(parts)
    counted = []
    for rank, cut in enumerate(ranks):
        first, last = cut.rows(rank)
        own = set(range(first, last))
        assert own == set(chunks[rank].tolist() if rank < len(chunks) else ())
        inside = differences(first, last)
        at_start, at_end = (differences(*cut.strip(order, end)) for end in (False, True))
        counted += [*inside, *at_end]
        touching = [rows for rows in differences(0, size) if own & set(rows)]
        assert sorted([*at_start, *inside, *at_end], key=lambda rows: rows.start) == touching
        received = set(range(first, last)).union(*(range(*receive) for _, receive, _ in neighbours(cut, order)))
        assert received >= {row for rows in touching for row in rows}
        for other, receive, send in neighbours(cut, order):  # what one sends the other expects
            assert (rank, send, receive) in neighbours(ranks[other], order)
    assert sorted(rows.start for rows in counted) == list(range(size - order))
