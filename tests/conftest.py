"""The one tolerance table and the fixtures of every test."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated_cuda import Emulator, compiler

# Without a GPU, Triton's kernels run in its interpreter. Triton reads the switch once, when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# dtype: (rtol, atol, rel_l2), all against a float64 reference. atol is relative to the largest expected entry.
TOLERANCES: dict[torch.dtype, tuple[float, float, float]] = {
    torch.float64: (1e-12, 1e-12, 1e-12),
    torch.float32: (1e-6, 1e-6, 1e-6),
    torch.bfloat16: (8e-3, 8e-3, 8e-3),
    torch.float16: (1e-3, 1e-3, 1e-3),
}


def assert_close_rel(actual: torch.Tensor, expected: torch.Tensor | np.ndarray | float, dtype: torch.dtype) -> None:
    """Compare with a float64 reference, elementwise and in the relative L2 norm, within ``TOLERANCES[dtype]``.

    ``dtype`` is that of the computation's inputs, which may differ from ``actual.dtype``. NaN and Inf must agree.
    """
    rtol, atol, rel_l2 = TOLERANCES[dtype]
    actual = actual.detach().to("cpu", torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64).detach().cpu()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    finite = expected[expected.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol * largest, equal_nan=True)
    error = (actual - expected)[expected.isfinite()].norm().item()
    norm = finite.norm().item()
    assert error <= rel_l2 * norm, f"relative L2 error {error / norm if norm else error:.3g}, allowed {rel_l2:.3g}"


@pytest.fixture(autouse=True)
def fixed_seeds_and_threads() -> Iterator[None]:
    """Every test starts from the same random state with two threads."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def benchmarks_on_path() -> Iterator[None]:
    """``benchmarks/`` is no package: its modules import each other by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield


NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")


@pytest.fixture
def bare_package(tmp_path: Path) -> Path:
    """A folder with the Python files of a checkout and no extension."""
    for name in ("smoothk", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=NOT_COPIED)
    return tmp_path


@pytest.fixture
def checkout(bare_package: Path) -> Path:
    """`bare_package` and what it takes to build it."""
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, bare_package)
    return bare_package


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """The CUDA kernels, run on the host."""
    if compiler() is None:
        pytest.skip("no C++ compiler")
    return Emulator(tmp_path_factory.mktemp("emulated_cuda"))
