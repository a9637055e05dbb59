"""The Triton kernels compiled for GPUs that need not be there, and what their machine code does."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from sass import Binary, Kernel, compile_kernels

from smoothk.backend import triton_device, unavailable_reason

if unavailable_reason("triton") is not None:
    pytest.skip(str(unavailable_reason("triton")), allow_module_level=True)

import triton.language as tl
from smoothk.kernels import difference_ops

DEVICE = triton_device()
ALIGNED, NARROW = (64, 576), (64, 27)  # in rows of 128-bit loads, and not


@dataclass(frozen=True)
class Case:
    """A call of an operator, by what decides its launches."""

    dtype: torch.dtype = torch.float32
    orders: tuple[int, ...] = (1, 2)
    norm: str = "l2"
    normalized: bool = False
    op: str = "add"
    grad_dtype: torch.dtype | None = None
    shapes: tuple[tuple[int, ...], ...] = (ALIGNED,)
    dim: tuple[int, ...] = (0,)
    arch: int = 90
    wide: bool = False  # as for tensors of more than 2**31 entries

    def __str__(self) -> str:
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        return " ".join(f"{name}={given[name]}" for name in given if given[name] != getattr(Case, name)) or "default"

    def run(self) -> None:
        weights = [torch.zeros(shape, dtype=self.dtype, device=DEVICE) for shape in self.shapes]
        grads = [torch.zeros_like(weight, dtype=self.grad_dtype) for weight in weights]
        factors = torch.ones(len(self.orders), dtype=torch.float64, device=DEVICE)
        options = (self.orders, self.dim, self.norm, self.normalized, 1e-8)
        ops = torch.ops.smoothk_triton
        if self.op == "add":
            ops.difference_penalty_accumulate_(grads, weights, factors, *options)
        elif self.op == "write":
            ops.difference_penalty_backward(factors, weights, *options)
        else:
            ops.difference_penalty(weights, *options)


ALONE = [Case(dtype, orders) for dtype in (torch.float32, torch.bfloat16) for orders in ((1,), (2,), (1, 2))]
MIXED = [replace(case, shapes=(ALIGNED, NARROW)) for case in ALONE]
OTHER_ADDING = [
    *(replace(case, arch=arch) for case in (MIXED[2], MIXED[5]) for arch in (80, 100)),
    Case(norm="huber"),
    Case(norm="l1", normalized=True),
    Case(norm="l21", normalized=True),
    Case(torch.float16),
    Case(torch.float64),
    Case(torch.bfloat16, grad_dtype=torch.float32),
]
OTHERS = [Case(op="write"), Case(op="value"), Case(shapes=(NARROW,), dim=(0, 1)), Case(shapes=(NARROW,), wide=True)]
CASES = [*ALONE, *MIXED, *OTHER_ADDING, *OTHERS]


@pytest.fixture(scope="module")
def binaries() -> dict[Case, list[Binary]]:
    """The machine code of the launches of every case."""
    launched: list[tuple[Case, Kernel]] = []
    with pytest.MonkeyPatch.context() as patch:
        for case in CASES:

            def record(kernel: Any, programs: int, *, case: Case = case, **arguments: Any) -> None:
                arguments |= {"INDEX": tl.int64} if case.wide else {}
                launched.append((case, Kernel.of_launch(kernel, arguments, arch=case.arch)))

            patch.setattr(difference_ops, "launch", record)
            case.run()
    compiled: dict[Case, list[Binary]] = {case: [] for case in CASES}
    for (case, _), binary in zip(launched, compile_kernels([kernel for _, kernel in launched]), strict=True):
        compiled[case].append(binary)
    return compiled


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_is_spilled_and_three_programs_fit(case: Case, binaries: dict[Case, list[Binary]]) -> None:
    assert len(binaries[case]) == 1 + (case.op == "add" and (case.normalized or case.norm == "l21"))
    for binary in binaries[case]:
        assert binary.spills == binary.local_bytes == 0
        assert binary.registers <= 168  # 3 programs of 128 threads in 65536 registers


@pytest.mark.parametrize("case", [*ALONE, *MIXED, *OTHER_ADDING], ids=str)
def test_at_least_16_loads_of_128_bits_are_in_flight(case: Case, binaries: dict[Case, list[Binary]]) -> None:
    assert binaries[case][-1].loads_in_flight() >= 16


@pytest.mark.parametrize("case", ALONE, ids=str)
def test_aligned_weights_and_gradients_move_in_128_bits(case: Case, binaries: dict[Case, list[Binary]]) -> None:
    (binary,) = binaries[case]
    rows, reach = (8, 1) if case.orders == (1,) else (6, 2)
    loads = [each for each in binary.instructions if each.is_load]
    stores = [each for each in binary.instructions if each.is_store]
    assert sum(load.bits == 128 for load in loads) == rows + 2 * reach + rows
    assert sum(store.bits == 128 for store in stores) == rows
    # The rest: records, addresses and coefficients (again in the last program); sums, and what the last one writes.
    narrow = [load for load in loads if load.bits < 128 and "STRONG" not in load.opcode]
    assert len(narrow) <= 7 + 2 + 2 + 2 * len(case.orders)
    assert sum(store.bits < 128 for store in stores) == 3 * len(case.orders) + 2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_integers_are_added_atomically_and_in_order(case: Case, binaries: dict[Case, list[Binary]]) -> None:
    for binary in binaries[case]:
        opcodes = [each.opcode for each in binary.instructions]
        tickets = [opcode for opcode in opcodes if opcode.startswith(("ATOM", "RED"))]
        assert set(tickets) <= {"ATOMG.E.ADD.STRONG.GPU"}  # int32: others name their type
        # One thread takes the ticket: after the stores of all threads, a barrier and the release; before they load what
        # other programs have stored, the acquire and a barrier. (In between the last program resets the ticket.)
        steps = {"STG": "s", "BAR.SYNC": "b", "MEMBAR": "r", "ATOM": "T", "CCTL.IVALL": "a", "LDG.*STRONG": "l"}
        trace = "".join(step for opcode in opcodes for start, step in steps.items() if re.match(start, opcode))
        assert len(re.findall("sb+rTab+s?(?=l)", trace)) == len(tickets), trace


def test_one_pass_takes_a_ticket_for_the_tensor_and_one_for_the_sum(binaries: dict[Case, list[Binary]]) -> None:
    for case, found in binaries.items():
        tickets = [sum(each.opcode.startswith("ATOM") for each in binary.instructions) for binary in found]
        assert tickets == ([2] if case.op != "write" and len(found) == 1 else [2, 0] if len(found) == 2 else [0])


def test_bfloat16_gradients_are_rounded_to_nearest(binaries: dict[Case, list[Binary]]) -> None:
    conversions = {
        each.opcode
        for case in ALONE
        if case.dtype == torch.bfloat16
        for each in binaries[case][0].instructions
        if each.opcode.startswith("F2F") and "BF16" in each.opcode
    }
    assert conversions == {"F2FP.BF16.F32.PACK_AB"}  # rounding towards zero would be ...RZ
