"""Compiles kernels for GPUs that need not be there and reads the machine code.

Triton's interpreter, in which the other tests run the kernels, cannot be left once Triton is imported. So the compiler
runs in a process of its own: `compile_kernels` starts it, ``python sass.py`` is it. `compile_cuda` calls nvcc.
"""

from __future__ import annotations

import importlib
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
_POINTERS = {
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


@dataclass(frozen=True)
class Kernel:
    """One specialisation of the ``triton.jit`` function ``module.name``.

    ``arguments`` maps each run-time argument to its Triton type (``"*fp32"``, ``"i32"``); pointers are taken as aligned
    to 16 bytes, as the launcher finds them. ``constants`` holds the ``tl.constexpr`` arguments.
    """

    module: str
    name: str
    arguments: dict[str, str]
    constants: dict[str, Any]
    arch: int = 90
    warps: int = 4

    @classmethod
    def of_launch(cls, function: Any, arguments: dict[str, Any], **options: int) -> Kernel:
        """What a launch of ``function`` compiles: tensors, int32 numbers, and constants, whose names are capitals."""
        constants = {name: value for name, value in arguments.items() if name.isupper()}
        kinds = {
            name: _POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            for name, value in arguments.items()
            if name not in constants
        }
        return cls(function.fn.__module__, function.__name__, kinds, constants, **options)


@dataclass(frozen=True)
class Instruction:
    """``@P0 LDG.E.128 R20, desc[UR8][R10.64]``: opcode ``LDG.E.128``, operands the rest; the predicate is dropped."""

    opcode: str
    operands: str

    @property
    def is_load(self) -> bool:
        return self.opcode.startswith("LDG")

    @property
    def is_store(self) -> bool:
        return self.opcode.startswith("STG")

    @property
    def is_spill(self) -> bool:
        return self.opcode.startswith(("LDL", "STL"))

    @property
    def bits(self) -> int:
        """Width of a load or store, per thread."""
        width = re.search(r"\.[US]?(8|16|64|128)\b", self.opcode)
        return int(width[1]) if width else 32

    @property
    def written(self) -> set[int]:
        """Registers that a load fills."""
        first = re.match(r"R(\d+)", self.operands)
        return set(range(int(first[1]), int(first[1]) + max(1, self.bits // 32))) if first else set()

    @property
    def read(self) -> set[int]:
        """Registers among the operands behind the first, or all of a store's: what the instruction waits for."""
        operands = self.operands if self.is_store else self.operands.partition(",")[2]
        return {int(register) for register in re.findall(r"\bR(\d+)", operands)}


@dataclass(frozen=True)
class Binary:
    """Machine code of one `Kernel`."""

    registers: int
    local_bytes: int
    shared_bytes: int
    sass: str

    @cached_property
    def instructions(self) -> list[Instruction]:
        line = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+ )?([A-Z][\w.]*)\s*([^;]*?)\s*;")
        return [Instruction(*found) for found in line.findall(self.sass)]

    @property
    def spills(self) -> int:
        """Instructions that move registers to or from memory."""
        return sum(instruction.is_spill for instruction in self.instructions)

    def loads_in_flight(self, bits: int = 128) -> int:
        """Loads of that width issued before an instruction needs what one of them brings, or a store is issued."""
        pending: set[int] = set()
        count = 0
        for instruction in self.instructions:
            if instruction.is_load and instruction.bits == bits:
                pending |= instruction.written
                count += 1
            elif count and (instruction.is_store or instruction.read & pending):
                break
        return count


def compile_kernels(kernels: Sequence[Kernel]) -> list[Binary]:
    """One `Binary` for each of ``kernels``, compiled without a GPU."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent)])
    done = subprocess.run(
        [sys.executable, "-c", "import sass; sass.serve()"],
        input=pickle.dumps(list(kernels)),
        env=environment,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    return pickle.loads(done.stdout)


def serve() -> None:
    """Read pickled kernels from standard input, write their pickled binaries to standard output."""
    kernels = pickle.load(sys.stdin.buffer)
    with ProcessPoolExecutor(2) as pool:
        sys.stdout.buffer.write(pickle.dumps(list(pool.map(_compile, kernels))))


def _compile(kernel: Kernel) -> Binary:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(kernel.module), kernel.name)
    source = ASTSource(
        function,
        kernel.arguments | dict.fromkeys(kernel.constants, "constexpr"),
        kernel.constants,
        {
            (function.arg_names.index(name),): [["tt.divisibility", 16]]
            for name, kind in kernel.arguments.items()
            if kind.startswith("*")
        },
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", kernel.arch, 32), options={"num_warps": kernel.warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name)
        sass = _output(knobs.nvidia.nvdisasm.path, "-c", cubin.name)
    registers, shared, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "SHARED", "LOCAL"))
    return Binary(registers, local, shared, sass)


def cuobjdump() -> str | None:
    """The disassembler of the CUDA toolkit, or the one that comes with Triton."""
    try:
        from triton import knobs
    except ImportError:
        return shutil.which("cuobjdump")
    return shutil.which("cuobjdump") or knobs.nvidia.cuobjdump.path


def compile_cuda(source: str, arch: int, folder: Path) -> dict[str, Binary]:
    """The kernels of CUDA C++ ``source``, by their mangled names."""
    file, cubin = folder / f"source_{arch}.cu", folder / f"sm_{arch}.cubin"
    file.write_text(source)
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    _output("nvcc", "-std=c++20", "-O3", "-cubin", target, str(file), "-o", str(cubin))
    usage = _output(cuobjdump(), "--dump-resource-usage", str(cubin))
    listing = _output(cuobjdump(), "--dump-sass", str(cubin))
    found = re.findall(r"Function (\S+):\s+REG:(\d+) .*?SHARED:(\d+) LOCAL:(\d+)", usage)
    code = {name: sass for name, sass in re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", listing, re.DOTALL)}
    return {name: Binary(int(reg), int(local), int(shared), code[name]) for name, reg, shared, local in found}


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
