"""The emulation that runs CUDA kernels on the host follows the PTX ISA, and notices what it is there to notice."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from emulated_cuda import Emulator

KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def registers(*size: int) -> np.ndarray:
    return np.zeros(size, dtype=np.uint32)


def call(emulator: Emulator, name: str, *arguments: object) -> str:
    """Runs a function of ``self_test.cpp``; what it found wrong, or nothing."""
    function = getattr(emulator.library, name)
    function.restype = ctypes.c_char_p
    converted = [each.ctypes.data_as(ctypes.c_void_p) if isinstance(each, np.ndarray) else each for each in arguments]
    emulator.library.forget_memory()
    for each in arguments:
        if isinstance(each, np.ndarray):
            emulator.library.declare_memory(each.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(each.nbytes))
    return (function(*converted) or b"").decode()


def bits(matrix: torch.Tensor) -> np.ndarray:
    """Entries as integers."""
    return matrix.view(torch.int32 if matrix.dtype == torch.float32 else torch.int16).numpy().astype(np.int64)


@pytest.mark.parametrize("dtype", KINDS)
def test_mma_is_a_matrix_product_of_the_fragments_of_the_ptx_isa(dtype: torch.dtype, emulator: Emulator) -> None:
    depth = 8 if dtype == torch.float32 else 16
    a, b, c = (torch.randint(-4, 5, size).to(dtype) for size in ((16, depth), (depth, 8), (16, 8)))
    a_registers, b_registers, c_registers = registers(32, 4), registers(32, 2), np.zeros((32, 4), dtype=np.float32)
    for lane in range(32):
        group, member = lane // 4, lane % 4
        for i in range(4):
            c_registers[lane, i] = c[group + 8 * (i // 2), 2 * member + i % 2]
        if depth == 8:  # "Matrix Fragments for mma.m16n8k8", .tf32
            for i in range(4):
                a_registers[lane, i] = bits(a)[group + 8 * (i % 2), member + 4 * (i // 2)] & 0xFFFFFFFF
            for i in range(2):
                b_registers[lane, i] = bits(b)[member + 4 * i, group] & 0xFFFFFFFF
        else:  # "Matrix Fragments for mma.m16n8k16 with floating point type"
            for i in range(8):
                row = group if i in (0, 1, 4, 5) else group + 8
                column = member * 2 + (i & 1) + (0 if i < 4 else 8)
                a_registers[lane, i // 2] |= np.uint32((bits(a)[row, column] & 0xFFFF) << 16 * (i % 2))
            for i in range(4):
                row = member * 2 + (i & 1) + (0 if i < 2 else 8)
                b_registers[lane, i // 2] |= np.uint32((bits(b)[row, group] & 0xFFFF) << 16 * (i % 2))
    assert call(emulator, "warp_mma", KINDS[dtype], a_registers, b_registers, c_registers) == ""
    expected = (c.double() + a.double() @ b.double()).numpy()
    for lane in range(32):
        for i in range(4):
            assert c_registers[lane, i] == expected[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2]


def test_ldmatrix_gives_each_lane_a_word_of_every_matrix(emulator: Emulator) -> None:
    memory = np.arange(64 * 4, dtype=np.uint32)
    rows = np.random.permutation(64)[:32].astype(np.uint32)
    result = registers(32, 4)
    assert call(emulator, "warp_ldmatrix", memory, ctypes.c_size_t(memory.nbytes), rows * np.uint32(16), result) == ""
    for lane in range(32):
        for matrix in range(4):
            assert result[lane, matrix] == memory[4 * rows[8 * matrix + lane // 4] + lane % 4]


def test_rounding_is_that_of_torch_and_of_tf32(emulator: Emulator) -> None:
    values = torch.cat([torch.randn(200) * 10.0 ** torch.randint(-6, 5, (200,)), torch.tensor([0.0, 65519.0, 7e4])])
    words = values.view(torch.int32).tolist()
    for dtype in (torch.bfloat16, torch.float16):
        found = [emulator.library.rounded(KINDS[dtype], ctypes.c_uint32(word & 0xFFFFFFFF)) & 0xFFFF for word in words]
        assert found == [each & 0xFFFF for each in bits(values.to(dtype))]
    kept = torch.tensor(
        [emulator.library.rounded(2, ctypes.c_uint32(w & 0xFFFFFFFF)) for w in words], dtype=torch.int32
    )
    assert (kept & 0x1FFF == 0).all()
    error = (kept.view(torch.float32) - values).abs()
    assert (error <= values.abs() * 2.0**-11).all()
    assert emulator.library.rounded(2, 0x3F801000) == 0x3F802000  # a tie, away from zero


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("missing", ["nothing", "commit", "wait", "barrier"])
def test_a_missing_step_of_an_asynchronous_copy_is_noticed(missing: str, reverse: bool, emulator: Emulator) -> None:
    memory, result = np.arange(256, dtype=np.uint32), registers(64, 4)
    steps = [missing != step for step in ("commit", "wait", "barrier")]
    emulator.library.set_reversed(reverse)
    assert call(emulator, "copy_to_neighbour", memory, *steps, result) == ""
    emulator.library.set_reversed(False)
    arrived = (result == np.roll(memory.reshape(64, 4), -1, axis=0)).all(axis=1)
    assert arrived.all() == (missing == "nothing")
    assert (result[~arrived] == 0xFFFFFFFF).all()  # NaN


def test_accesses_outside_of_memory_are_errors(emulator: Emulator) -> None:
    for address in (64, -16):
        assert "outside of shared memory, block 0, thread 0" in call(emulator, "read_shared_at", address)
    assert "misaligned access to shared memory" in call(emulator, "read_shared_at", 8)
    short = np.zeros(63 * 4 + 3, dtype=np.uint32)
    assert "outside of global memory, block 0, thread 63" in call(
        emulator, "copy_to_neighbour", short, True, True, True, registers(64, 4)
    )


def test_threads_that_wait_for_ever_are_an_error(emulator: Emulator) -> None:
    assert "deadlock" in call(emulator, "half_a_block_waits")
