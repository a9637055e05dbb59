"""Clocks and scales: interleaved samples, their spread, peak memory, and the bandwidth of a plain copy."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

Run = Callable[[], Any]


@dataclass
class Samples:
    """Seconds per call, and pages the kernel had to map in per call: fresh memory is what a temporary costs most."""

    seconds: list[float] = field(default_factory=list)
    page_faults: list[float] = field(default_factory=list)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Elsewhere(Protocol):
    """A call made in another process, which takes the measurements itself."""

    def __call__(self) -> Any: ...

    def sample(self, calls: int) -> tuple[float, float]: ...

    def peak_extra_bytes(self) -> dict[str, int]: ...


def sample(run: Run | Elsewhere, device: torch.device, calls: int = 1) -> tuple[float, float]:
    """Seconds and page faults per call of ``run``: device events on CUDA, the wall clock on the CPU."""
    if hasattr(run, "sample"):
        return run.sample(calls)
    faults = _page_faults()
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize(device)
        seconds = start.elapsed_time(end) / 1e3
    else:
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        seconds = time.perf_counter() - begin
    return seconds / calls, (_page_faults() - faults) / calls


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Freed memory stays with the process, where the C library is GNU's.

    It is given back where it lies at the end of the heap, and page faults fetch it again: in a network that can take
    half of a call, or nothing, as the heap happens to lie. Blocks of 32 MiB and more are mapped anew all the same.
    Afterwards the thresholds are those of a new process, but do not adapt any more: no call undoes that.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    trim, mmap, usual, largest = -1, -3, 128 << 10, 32 << 20  # malloc.h; mmap takes no threshold above
    libc.mallopt(trim, 1 << 30), libc.mallopt(mmap, largest)
    try:
        yield
    finally:
        libc.mallopt(trim, usual), libc.mallopt(mmap, usual)
        libc.malloc_trim(0)


def interleave(
    runs: Mapping[str, Run | Elsewhere],
    device: torch.device,
    *,
    samples: int,
    budget: float,
    before: Mapping[str, Run] | None = None,
    at_least: int = 3,
) -> dict[str, Samples]:
    """Samples by name: in every round each side is timed once, in an order drawn anew.

    Sample i of all sides comes from the same stretch of time, so that ratios of paired samples are free of slow drift.

    Args:
        runs: what to time.
        device: where it runs.
        samples: rounds.
        budget: seconds after which no further round is begun, once there are ``at_least``.
        before: called untimed right before each sample of a side.
    """
    before = before or {}
    calls = {name: _calls(run, device, once=name in before) for name, run in runs.items()}
    order, draw = list(runs), random.Random(0)
    samples_of = {name: Samples() for name in runs}
    start = time.perf_counter()
    for done in range(samples):
        if done >= at_least and time.perf_counter() - start > budget:
            break
        draw.shuffle(order)
        for name in order:
            if name in before:
                before[name]()
            seconds, faults = sample(runs[name], device, calls[name])
            samples_of[name].seconds.append(seconds)
            samples_of[name].page_faults.append(faults)
    return samples_of


def _calls(run: Run | Elsewhere, device: torch.device, once: bool) -> int:
    """Calls per sample, so that a sample is well above the clock's step: 5 ms on CUDA, 1 ms on the CPU; at most 20."""
    run()  # warm
    if once:
        return 1
    goal = 5e-3 if device.type == "cuda" else 1e-3
    return min(20, max(1, round(goal / max(sample(run, device)[0], 1e-9))))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile (linear between samples)."""
    p10, median, p90 = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90)}


def paired_ratio(seconds: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """`spread` of sample by sample quotients."""
    return spread([a / b for a, b in zip(seconds, baseline, strict=True)])


def peak_extra_bytes(run: Run | Elsewhere, device: torch.device) -> dict[str, int]:
    """Most memory that one call holds beyond what is allocated when it begins.

    ``peak_extra_bytes`` is what torch's allocator handed out: its counter on CUDA, its profiler's records on the CPU.
    There ``resident_growth_bytes`` says how far the process's resident set rose: it also sees buffers that are not
    torch's, and memory that the C allocator keeps after it was freed.
    """
    if hasattr(run, "peak_extra_bytes"):
        return run.peak_extra_bytes()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return {"peak_extra_bytes": torch.cuda.max_memory_allocated(device) - held}
    return {"peak_extra_bytes": _allocator_peak(run), "resident_growth_bytes": _resident_growth(run)}


def _allocator_peak(run: Run) -> int:
    from torch.profiler import ProfilerActivity, profile

    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(0, *np.cumsum([0, *(event.nbytes() for event in events)]).tolist())


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what C++ writes to standard error: torch's profiler announces every start and stop there."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _resident_growth(run: Run) -> int:
    """Growth of the resident set's high-water mark, which Linux lets a process reset; 0 where it does not."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    held = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - held


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory: L2 on CUDA, L3 on the CPU (32 MiB where the system does not say)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        return 1024 * int(Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip().rstrip("K"))
    except (OSError, ValueError):
        return 32 << 20


def copy(device: torch.device, size: int) -> Run:
    """``copy_`` of ``size`` bytes of random data: twice that are read and written."""
    source = torch.empty(size // 4, device=device).normal_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
