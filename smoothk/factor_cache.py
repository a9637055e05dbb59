"""What is computed from a pair of factors once and used until they change: the packed form of the C++ kernel, and the
merged dense weight.

A value is kept for as long as the tensor ``v`` lives. It is computed anew when a factor was replaced, moved, or written
to: torch counts the writes to a tensor, all but those through ``.data``, for which the bits of up to 64 entries of each
factor on the CPU (all, of small ones) are compared as well. On other devices, where that would wait, such writes go
unnoticed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import backend

_lock = threading.Lock()
_values: WeakIdKeyDictionary = WeakIdKeyDictionary()  # v -> {kind: value}


def kept(v: Tensor, kind: Hashable) -> Any:
    """What was kept of this ``kind`` for ``v``, or None."""
    values = _values.get(v)
    return None if values is None else values.get(kind)


def keep(v: Tensor, kind: Hashable, value: Any) -> None:
    """Keep ``value``, which must not hold ``v``, until ``v`` is gone or another takes its place."""
    with _lock:
        _values.setdefault(v, {})[kind] = value


def forget(v: Tensor) -> None:
    """Drop what was kept for ``v``, and with it the weak references that `torch.utils.swap_tensors` refuses."""
    with _lock:
        _values.pop(v, None)


def cached(kind: Hashable, v: Tensor, u: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """``compute()``, or what it gave when it was last called for this ``kind`` and these factors as they are now."""
    if v.is_inference() or u.is_inference():  # torch does not count the writes to these
        return compute()
    state = state_of(v, u)
    entry = kept(v, kind)
    if entry is not None and entry[0]() is u and entry[1] == state:
        return entry[2]
    with torch.no_grad():
        value = compute()
    keep(v, kind, (weakref.ref(u), state, value))
    return value


def state_of(v: Tensor, u: Tensor) -> tuple[int, ...]:
    """What changes when a factor does; see above."""
    places = v.data_ptr(), u.data_ptr()
    if _is_dense(v) and _is_dense(u) and backend.unavailable_reason("cpp") is None:
        sample = backend.extension().sample_bits
        return v._version, u._version, *places, sample(places[0], v.nbytes), sample(places[1], u.nbytes)
    return v._version, u._version, *places, _sample(v), _sample(u)


def _is_dense(factor: Tensor) -> bool:
    """Whether it is on the CPU and fills the memory from its first entry to its last."""
    if not factor.is_cpu:
        return False
    channels_last = factor.dim() == 4 and factor.is_contiguous(memory_format=torch.channels_last)
    return factor.is_contiguous() or channels_last


def _sample(factor: Tensor) -> int:
    if not factor.is_cpu:  # nothing may wait for the device
        return 0
    flat = factor.detach().reshape(-1)
    return hash(tuple(flat[:: max(1, flat.numel() // 64)].tolist()))
