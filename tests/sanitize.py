"""Runs the tests of the C++ kernels on an extension built with AddressSanitizer and UndefinedBehaviorSanitizer.

``python tests/sanitize.py [arguments of pytest]``. An error of a sanitizer ends the tests with its report.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tree

FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
# The parts of the test table that reach C++ code.
TESTS = (
    "test_ops.py",
    "test_op_table.py",
    "test_difference.py",
    "test_low_rank_ops.py",
    "test_factor_cache.py",
    "test_low_rank_conv.py",
    "test_layers.py",
    "test_inference.py",
    "test_properties.py",
    "test_simd.py",
)
# Reserves 6 GiB and writes a few rows: the shadow memory of that would be written in full.
LEFT_OUT = "not offsets_beyond_two_to_the_31"


def library(name: str) -> str:
    command = ["c++", f"-print-file-name={name}"]
    path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if not Path(path).is_absolute():
        sys.exit(f"the compiler has no {name}")
    return path


def main(arguments: list[str]) -> int:
    preload = f"{library('libasan.so')} {library('libubsan.so')}"
    folder = tree.ROOT / "build" / "sanitize"
    checkout = tree.copy(folder / "tree")
    tree.build(checkout, folder / "cmake", FLAGS)
    environment = tree.environment(
        checkout,
        LD_PRELOAD=preload,
        # Python and torch free little of what they allocate once. Only in a process of the tests' own is memory short.
        ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1",
        UBSAN_OPTIONS="print_stacktrace=1",
        PYTHONMALLOC="malloc",
    )
    script = """
import smoothk
from smoothk.backend import unavailable_reason
assert unavailable_reason("cpp") is None, unavailable_reason("cpp")
assert "-fsanitize=address,undefined" in smoothk.info()["extension"]["flags"]
assert "libasan" in open("/proc/self/maps").read()
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=checkout, env=environment)
    command = [sys.executable, "-m", "pytest", "-W", "error", "-x", "-q", "-s", "-p", "no:cacheprovider"]
    chosen = arguments or ["-k", LEFT_OUT, *(str(checkout / "tests" / name) for name in TESTS)]
    return subprocess.run([*command, *chosen], cwd=checkout, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
