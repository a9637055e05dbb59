"""Tables on the device that let one launch walk over many tensors, and the cache that keeps them between steps.

Not yet run on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

Table = TypeVar("Table")


def signature(tensors: Sequence[Tensor]) -> Hashable:
    """What a table of ``tensors``, all on one device, depends on: addresses, shapes, strides and dtypes."""
    return (
        tensors[0].device,  # empty tensors have no address
        tuple(map(Tensor.data_ptr, tensors)),
        tuple(map(Tensor.size, tensors)),
        tuple(map(Tensor.stride, tensors)),
        tuple([tensor.dtype for tensor in tensors]),
    )


def to_device(table: np.ndarray, device: torch.device) -> Tensor:
    """A copy of ``table`` on ``device``; the host does not wait for it."""
    host = torch.from_numpy(table)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


class TableCache(Generic[Table]):
    """The ``size`` tables built last, by key.

    A table is filled on the CUDA stream it was first asked for on, and only used there: on another stream it is built
    anew. Building copies from the host, which a CUDA graph would repeat from memory that may be gone, so a capture
    must find its tables here. It takes them out: they stay for ever, and the graph shares them with no later call.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._tables: dict[Hashable, tuple[int, Table]] = {}
        self._captured: dict[Hashable, Table] = {}
        self._lock = threading.RLock()

    def get(self, key: Hashable, device: torch.device, build: Callable[[], Table]) -> Table:
        """The table of ``key``, from ``build()`` where there is none.

        Raises:
            RuntimeError: there is none, and the current stream is being captured.
        """
        stream, capturing = _stream_of(device)
        with self._lock:
            if capturing:
                return self._captured_table(key)
            found = self._tables.get(key)
            if found is None or found[0] != stream:
                found = (stream, build())
                self._tables.pop(key, None)
                self._tables[key] = found
                if len(self._tables) > self.size:
                    del self._tables[next(iter(self._tables))]
            return found[1]

    def _captured_table(self, key: Hashable) -> Table:
        if key not in self._captured:
            if key not in self._tables:
                raise RuntimeError(
                    "a CUDA graph can capture this only after a warm-up call with the same tensors: run a step before "
                    "the capture, and keep the gradients where they are (zero_grad(set_to_none=False)); a backward "
                    "pass makes new ones: capture SmoothnessPenalty.accumulate_grad() in its place"
                )
            self._captured[key] = self._tables.pop(key)[1]
        return self._captured[key]


def _stream_of(device: torch.device) -> tuple[int, bool]:
    """Handle of the current stream, and whether it is being captured."""
    if device.type != "cuda":
        return 0, False
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()


def row_tiles(numel: int, size: int, stride: int, rows: int, columns: int) -> np.ndarray:
    """Tiles of ``rows`` rows and ``columns`` neighbouring entries: int64 ``[tiles, 3]``, first entry, columns, row.

    The rows are the ``size`` entries of an axis of a dense tensor, ``stride`` apart. Tiles that share rows follow each
    other, while these are still in cache.
    """
    slab = size * stride
    counts = (numel // slab, -(-stride // columns), -(-size // rows))
    outer, column, row = (index.ravel() for index in np.indices(counts, dtype=np.int64))
    column, row = column * columns, row * rows
    return np.stack([outer * slab + row * stride + column, np.minimum(stride - column, columns), row], axis=1)


def flat_tiles(numel: int, entries: int) -> np.ndarray:
    """Tiles of ``entries`` neighbouring entries: int64 ``[tiles, 3]``, first entry, entries, 0."""
    first = np.arange(0, numel, entries, dtype=np.int64)
    return np.stack([first, np.minimum(numel - first, entries), np.zeros_like(first)], axis=1)


def grid_tiles(height: int, width: int, rows: int, columns: int) -> np.ndarray:
    """Tiles of a ``[height, width]`` grid: int64 ``[tiles, 2]``, first row and first column; column by column."""
    counts = (-(-width // columns), -(-height // rows))
    column, row = (index.ravel() for index in np.indices(counts, dtype=np.int64))
    return np.stack([row * rows, column * columns], axis=1)
