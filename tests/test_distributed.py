"""Weights on several processes: what every process finds in `distributed_worker.py`, and the arithmetic of the cuts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch.distributed.fsdp", reason="this torch has no torch.distributed")
if not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

from distributed_worker import CHECKS  # noqa: E402

from smoothk.halo import Cut, neighbours  # noqa: E402

TESTS = Path(__file__).resolve().parent
SECONDS = 100


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory):  # noqa: ANN201
    """``results(world)[rank][check]`` of one run of all checks on ``world`` processes."""

    @lru_cache
    def run(world: int) -> list[dict[str, str]]:
        folder = tmp_path_factory.mktemp(f"world{world}")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
        command = [sys.executable, "-W", "error", str(TESTS / "distributed_worker.py")]
        logs = [folder / f"{rank}.log" for rank in range(world)]
        workers = []
        try:
            for rank, log in enumerate(logs):
                with log.open("w") as output:
                    arguments = [*command, str(rank), str(world), str(folder)]
                    workers.append(subprocess.Popen(arguments, env=environment, stdout=output, stderr=output))
            for worker in workers:
                worker.wait(SECONDS)
        except subprocess.TimeoutExpired:
            pass  # the checks that are missing say so
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        found = []
        for rank, log in enumerate(logs):
            file = folder / f"{rank}.json"
            text = log.read_text()[-2000:]
            found.append(dict.fromkeys(CHECKS, f"did not run on rank {rank}: an earlier check failed or hung\n{text}"))
            found[-1].update(json.loads(file.read_text()) if file.exists() else {})
        return found

    return run


@pytest.mark.parametrize(
    ("check", "world"), [(name, world) for name, (_, worlds) in CHECKS.items() for world in worlds]
)
def test_on_several_processes(results, check: str, world: int) -> None:  # noqa: ANN001
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
