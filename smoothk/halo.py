"""Rows that ranks exchange around the borders of the shards of an axis."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Cut:
    """An axis of ``size`` rows as ``parts`` ranks hold it, in chunks like `torch.chunk`'s, seen from ``rank``."""

    axis: int
    size: int
    parts: int
    rank: int

    @property
    def chunk(self) -> int:
        return -(-self.size // self.parts)

    def rows(self, rank: int) -> tuple[int, int]:
        """First row of ``rank`` and the one after its last."""
        return min(rank * self.chunk, self.size), min((rank + 1) * self.chunk, self.size)

    def strip(self, order: int, at_end: bool) -> tuple[int, int]:
        """Rows whose differences touch this rank's rows and others': with a first row of its own (``at_end``) or not.

        A shard shorter than ``order`` has strips that reach over it; no difference is in both.
        """
        first, last = self.rows(self.rank)
        if first == last:
            return first, first
        start, stop = (max(first, last - order), last + order) if at_end else (first - order, first + order)
        return max(start, 0), min(stop, self.size)


def neighbours(cut: Cut, width: int) -> list[tuple[int, tuple[int, int], tuple[int, int]]]:
    """``(rank, rows to receive, rows to send)`` for each rank that holds a row within ``width`` rows of this one's."""
    first, last = cut.rows(cut.rank)
    if first == last:
        return []
    near = []
    for rank in range(max(first - width, 0) // cut.chunk, (min(last + width, cut.size) - 1) // cut.chunk + 1):
        start, stop = cut.rows(rank)
        if rank != cut.rank:
            receive = max(start, first - width), min(stop, last + width)
            send = max(first, start - width), min(last, stop + width)
            near.append((rank, receive, send))
    return near


class Segment(NamedTuple):
    """Consecutive rows of the whole axis from row ``first`` on."""

    first: int
    rows: Tensor


@dataclass(frozen=True)
class Strip:
    """A copy of the rows of ``cut.strip(width, at_end)``."""

    rows: Tensor
    cut: Cut
    width: int
    at_end: bool

    @property
    def kind(self) -> tuple[int, bool]:
        return self.cut.axis, self.at_end

    def of_order(self, order: int, strip: Tensor) -> Tensor:
        """The rows of ``strip``, shaped like this one, that the differences of ``order`` need."""
        start, stop = self.cut.strip(order, self.at_end)
        return strip.narrow(self.cut.axis, start - self.cut.strip(self.width, self.at_end)[0], stop - start)

    def own(self, strip: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that ``strip``, shaped like this one, and the local tensor have in common: of ``local``, of it."""
        start, stop = self.cut.strip(self.width, self.at_end)
        first, last = self.cut.rows(self.cut.rank)
        begin, count = max(start, first), min(stop, last) - max(start, first)
        axis = self.cut.axis
        return local.narrow(axis, begin - first, count), strip.narrow(axis, begin - start, count)


def exchange(shards: Sequence[tuple[Cut, Tensor]], width: int, group: ProcessGroup) -> list[list[Segment]]:
    """For every shard its own rows and those within ``width`` of them, in order."""
    outgoing: dict[int, list[Tensor]] = defaultdict(list)
    incoming: dict[int, list[tuple[int, int, list[int]]]] = defaultdict(list)
    for i, (cut, local) in enumerate(shards):
        first, _ = cut.rows(cut.rank)
        for rank, (start, stop), (begin, end) in neighbours(cut, width):
            outgoing[rank].append(local.narrow(cut.axis, begin - first, end - begin).reshape(-1))
            shape = list(local.shape)
            shape[cut.axis] = stop - start
            incoming[rank].append((i, start, shape))

    ranks = range(group.size())
    _, local = shards[0]
    sent = torch.cat([local.new_empty(0), *(rows for rank in ranks for rows in outgoing[rank])])
    send_sizes = [sum(rows.numel() for rows in outgoing[rank]) for rank in ranks]
    receive_sizes = [sum(prod(shape) for *_, shape in incoming[rank]) for rank in ranks]
    received = local.new_empty(sum(receive_sizes))
    dist.all_to_all_single(received, sent, receive_sizes, send_sizes, group=group)

    segments = [[Segment(cut.rows(cut.rank)[0], local)] for cut, local in shards]
    pieces = [piece for rank in ranks for piece in incoming[rank]]
    for (i, start, shape), rows in zip(pieces, received.split([prod(shape) for *_, shape in pieces]), strict=True):
        segments[i].append(Segment(start, rows.view(shape)))
    return [sorted(of_shard, key=lambda segment: segment.first) for of_shard in segments]


def copy_strip(segments: Sequence[Segment], cut: Cut, width: int, at_end: bool) -> Strip:
    """The strip at one end of a shard from what `exchange` found for it."""
    start, stop = cut.strip(width, at_end)
    rows = []
    for first, segment in segments:
        begin, end = max(start, first), min(stop, first + segment.shape[cut.axis])
        if begin < end:
            rows.append(segment.narrow(cut.axis, begin - first, end - begin))
    return Strip(torch.cat(rows, cut.axis), cut, width, at_end)
