"""A side that lives in a process of its own, on weights and gradients in shared memory.

Temporaries cost what the C allocator asks of the kernel for them, and that depends on what else the process has
allocated: among other sides they find warm memory, alone, as in a user's script, they may not. Both are worth a row.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing
from timing import Run, peak_extra_bytes, sample
from torch import Tensor, nn

Call = Callable[[Sequence[nn.Parameter]], Run]
SETTLE = 0.01  # seconds; OpenMP's threads spin for a while after a call, on the cores of whoever comes next
CPU = torch.device("cpu")


class OwnProcess:
    """``call(weights)`` for every copy of some shared weights, run by another process.

    Calling it runs them once and returns the values. The process ends with this object.

    Args:
        call: picklable; from the weights of one copy to the call to be timed.
        copies: weights in shared memory, gradients too.
    """

    def __init__(self, call: Call, copies: Sequence[Sequence[nn.Parameter]]) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self._pipe, far_end = context.Pipe()
        tensors = [[(weight.detach(), weight.grad) for weight in weights] for weights in copies]
        arguments = (far_end, call, tensors, torch.get_num_threads())
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        far_end.close()
        self._end = weakref.finalize(self, _end, self._pipe, process)

    def __call__(self) -> list[Tensor]:
        return [torch.tensor(value, dtype=torch.float64) for value in self._ask("run")]

    def sample(self, calls: int) -> tuple[float, float]:
        """As `timing.sample`, measured in the other process."""
        measured = self._ask("sample", calls)
        time.sleep(SETTLE)
        return measured

    def peak_extra_bytes(self) -> dict[str, int]:
        """As `timing.peak_extra_bytes`, measured in the other process."""
        return self._ask("peak")

    def _ask(self, *request: Any) -> Any:
        self._pipe.send(request)
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


def _end(pipe: Connection, process: Any) -> None:
    pipe.close()
    process.join(10)
    if process.is_alive():
        process.kill()


def _serve(pipe: Connection, call: Call, tensors: list[list[tuple[Tensor, Tensor]]], threads: int) -> None:
    torch.set_num_threads(threads)
    copies = [[_parameter(*pair) for pair in pairs] for pairs in tensors]
    runs = [call(weights) for weights in copies]

    def run() -> list[float]:
        return [float(run()) for run in runs]

    answers = {"run": run, "sample": lambda calls: sample(run, CPU, calls), "peak": lambda: peak_extra_bytes(run, CPU)}
    while True:
        try:
            name, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(answers[name](*arguments))
        except Exception as error:  # the other side raises it
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _parameter(weight: Tensor, grad: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(weight)
    parameter.grad = grad
    return parameter
