"""A copy of the checkout with an extension of its own, for `sanitize.py` and `mutants.py`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
_NOT_COPIED = shutil.ignore_patterns("__pycache__", ".hypothesis")


def copy(target: Path) -> Path:
    """Everything that the tests look at, with the extension that is built, if one is; ``target`` is replaced."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in ("smoothk", "kernels", "csrc", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=_NOT_COPIED)
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy2(file, target)
    return target


def environment(tree: Path, **changes: str) -> dict[str, str]:
    """That of a process which imports smoothk from ``tree``, an installed one notwithstanding."""
    return {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", **changes}


def build(tree: Path, folder: Path, flags: str) -> None:
    """Compile the extension of ``tree`` in ``folder``, which keeps what has not changed, and put it into the package.

    Raises:
        subprocess.CalledProcessError: it does not compile.
    """
    import pybind11
    import torch

    configure = [
        *("cmake", "-S", str(tree), "-B", str(folder), "-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={flags}"),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DSMOOTHK_TORCH_DIR={Path(torch.__file__).parent}",
        f"-DSMOOTHK_TORCH_VERSION={torch.__version__}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if ninja := shutil.which("ninja", path=tools):
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    for command in (configure, ["cmake", "--build", str(folder), "--parallel", "--target", "_C"]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PATH": tools})
    shutil.copy2(folder / MODULE, tree / "smoothk" / MODULE)
