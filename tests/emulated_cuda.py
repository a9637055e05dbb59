"""The CUDA kernels compiled for the host and run by the emulation in ``cuda_emulation/``, through ctypes."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc" / "cuda"
SOURCES = [
    *(
        HERE / "cuda_emulation" / name
        for name in ("library.cpp", "block.cpp", "emulated_ptx.cpp", "self_test.cpp", "ops.cpp")
    ),
    CSRC / "low_rank_conv_plan.cpp",
]
TORCH = Path(torch.__file__).resolve().parent
FLAGS = [
    *"-std=c++20 -fPIC -U_FORTIFY_SOURCE -Wall -Wextra -Werror -Wno-unknown-pragmas".split(),
    *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(TORCH / "include")),
    "-Dsmoothk=smoothk_emulated",  # the operators' namespace too
]
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # of csrc/types.h


def compiler() -> str | None:
    """The C++ compiler of this machine."""
    candidates = [*os.environ.get("CXX", "").split()[:1], "c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, candidates)), None)


def build(folder: Path) -> ctypes.CDLL:
    """The library of ``SOURCES``, compiled into ``folder``."""
    library, objects = folder / "emulated_cuda.so", {source: folder / f"{source.stem}.o" for source in SOURCES}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_compile, objects.keys(), objects.values()))
    _run("-shared", *map(str, objects.values()), f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-o", str(library))
    loaded = ctypes.CDLL(str(library))
    loaded.low_rank_conv_packed_size.restype = ctypes.c_int64
    loaded.low_rank_conv_plan.restype = ctypes.c_bool
    for name in ("low_rank_conv_pack", "low_rank_conv"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def _compile(source: Path, target: Path) -> None:
    # The kernel itself takes little of the time, and its many instantiations take long to optimise.
    level = "-O0" if source.name == "library.cpp" else "-O2"
    _run(*FLAGS, level, f"-I{HERE / 'cuda_emulation'}", "-c", str(source), "-o", str(target))


def _run(*arguments: str) -> None:
    done = subprocess.run([compiler(), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Device(NamedTuple):
    """Of a GPU, what the launcher asks for; by default one on which nothing is gained by smaller tiles."""

    multiprocessors: int = 1
    shared_limit: int = 232448  # of sm_90 and sm_100


@dataclass(frozen=True)
class Sizes:
    """``LowRankConvShape``, field by field."""

    batch: int
    groups: int
    in_channels: int
    rank: int
    out_channels: int
    height: int
    width: int
    out_height: int
    out_width: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int
    spatial: int

    def array(self) -> ctypes.Array:
        values = astuple(self)
        return (ctypes.c_int64 * len(values))(*values)


class Failed(RuntimeError):
    """What the emulation, or the launcher, found wrong."""


class Emulator:
    """Runs the kernels of one library on CPU tensors."""

    def __init__(self, folder: Path) -> None:
        self.library = build(folder)

    def plan(self, sizes: Sizes, dtype: torch.dtype, with_z: bool, device: Device) -> list[int]:
        """Images, rows, columns of a tile, blocks and bytes of shared memory; empty where the case is not taken."""
        result = (ctypes.c_int64 * 5)()
        numbers = map(ctypes.c_int64, device)
        taken = self.library.low_rank_conv_plan(sizes.array(), DTYPES[dtype], with_z, *numbers, result)
        return list(result) if taken else []

    def pack(self, sizes: Sizes, v: Tensor, u: Tensor) -> Tensor:
        size = self.library.low_rank_conv_packed_size(sizes.array(), DTYPES[v.dtype])
        packed = torch.full((size,), torch.nan, dtype=v.dtype)
        with self._memory(v, u, packed):
            self._check(self.library.low_rank_conv_pack(sizes.array(), DTYPES[v.dtype], *map(_pointer, (v, u, packed))))
        return packed

    def low_rank_conv(
        self,
        sizes: Sizes,
        input: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        relu: bool,
        output: Tensor,
        z: Tensor | None,
        device: Device,
        reverse: bool = False,
    ) -> None:
        """Fills ``output`` and ``z``; images are channels last. ``reverse`` runs the last thread of a block first."""
        self.library.set_reversed(reverse)
        tensors = (input, packed, bias, residual, output, z)
        pointers = [_pointer(tensor) for tensor in tensors]
        with self._memory(*(tensor for tensor in tensors if tensor is not None)):
            self._check(
                self.library.low_rank_conv(
                    sizes.array(), DTYPES[input.dtype], *pointers[:4], relu, *pointers[4:], *device
                )
            )

    @contextmanager
    def _memory(self, *tensors: Tensor) -> Iterator[None]:
        for tensor in tensors:
            self.library.declare_memory(_pointer(tensor), ctypes.c_size_t(tensor.untyped_storage().nbytes()))
        try:
            yield
        finally:
            self.library.forget_memory()

    def _check(self, message: bytes | None) -> None:
        if message is not None:
            raise Failed(message.decode())


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
