"""Tables of tensors that kernels read: how long one is kept, and who may use it."""

from __future__ import annotations

import pytest
import torch

from smoothk.backend import unavailable_reason

if unavailable_reason("triton") is not None:
    pytest.skip(str(unavailable_reason("triton")), allow_module_level=True)

from smoothk.kernels import tensor_table


class Streams:
    """What `tensor_table` sees of CUDA: the current stream and whether it is being captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = (1, False)
        monkeypatch.setattr(tensor_table, "_stream_of", lambda device: self.current)


def table_of(cache: tensor_table.TableCache[object], key: str) -> object:
    return cache.get(key, torch.device("cpu"), object)


def test_a_cache_keeps_the_tables_built_last() -> None:
    cache: tensor_table.TableCache[object] = tensor_table.TableCache(2)
    tables = [table_of(cache, key) for key in "abc"]
    assert [table_of(cache, key) for key in "bc"] == tables[1:]
    assert table_of(cache, "a") is not tables[0] and table_of(cache, "c") is tables[2]
    assert table_of(cache, "b") is not tables[1]


def test_a_table_is_used_on_the_stream_that_filled_it(monkeypatch: pytest.MonkeyPatch) -> None:
    streams, cache = Streams(monkeypatch), tensor_table.TableCache(2)
    first = table_of(cache, "a")
    streams.current = (2, False)
    second = table_of(cache, "a")
    assert second is not first and table_of(cache, "a") is second


def test_a_capture_takes_its_tables_from_the_warm_up_and_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    streams, cache = Streams(monkeypatch), tensor_table.TableCache(1)
    warm = table_of(cache, "a")
    streams.current = (7, True)
    assert table_of(cache, "a") is warm and table_of(cache, "a") is warm
    streams.current = (1, False)
    assert table_of(cache, "a") is not warm  # a replay and this call may run at the same time
    table_of(cache, "b")
    streams.current = (7, True)
    assert table_of(cache, "a") is warm


def test_empty_tensors_are_told_apart_by_their_device() -> None:
    empty = [torch.empty(0, 3, device=device) for device in ("cpu", "meta")]
    assert tensor_table.signature(empty[:1]) != tensor_table.signature(empty[1:])
