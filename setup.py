"""Metadata is in pyproject.toml; this file compiles csrc/ with CMake against the torch that is already installed.

The environment variable SMOOTHK_BUILD decides what is compiled:

- ``auto`` (default): what the installed torch and compilers allow; pure Python with a printed reason where they do not.
- ``cpu``, ``cuda``: that, or an error.
- ``none``: nothing; an extension left in place by an earlier build is removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")
OLDEST_TORCH = (2, 10)  # the first with every stable-ABI function that csrc/ops.cpp uses


class CannotBuild(Exception):
    """One line that says what is missing."""


def build_mode() -> str:
    mode = os.environ.get("SMOOTHK_BUILD") or "auto"
    if mode not in MODES:
        sys.exit(f"SMOOTHK_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def package_version() -> str:
    text = (ROOT / "smoothk" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


def find_torch() -> ModuleType:
    try:
        import torch
    except ImportError:  # pip's build isolation hides site-packages: look there
        for key in ("purelib", "platlib"):
            site.addsitedir(sysconfig.get_paths()[key])
        try:
            import torch
        except ImportError as error:
            raise CannotBuild("PyTorch is not installed in this environment; install it first") from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        raise CannotBuild(f"torch {torch.__version__} is too old, {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} is needed")
    return torch


def check_tools() -> None:
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        raise CannotBuild(f"no C++ compiler found (looked for {', '.join(compilers)})")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        raise CannotBuild("Python.h not found; install the Python development headers")
    if not shutil.which("cmake"):
        raise CannotBuild("cmake not found")


def cmake_build(module: Path, debug: bool) -> str:
    """Compile and copy the result to ``module``; returns the version of the torch it was built against."""
    check_tools()
    torch = find_torch()
    import pybind11

    # A fixed place keeps rebuilds incremental; setuptools' own would be new for every editable install.
    build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-torch{torch.__version__}"
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(build)),
        f"-DCMAKE_BUILD_TYPE={'Debug' if debug else 'Release'}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DSMOOTHK_TORCH_DIR={Path(torch.__file__).parent}",
        f"-DSMOOTHK_TORCH_VERSION={torch.__version__}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    if ninja := shutil.which("ninja"):  # named every time: the cached one may lie in a build environment now gone
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    for command in (configure, ["cmake", "--build", str(build), "--parallel"]):
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise CannotBuild(f"`{' '.join(command[:4])}` failed, its output is above") from error
    module.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(build / module.name, module)
    return torch.__version__


class BuildExtension(build_ext):
    """Replaces setuptools' compilation; leaves a record of the outcome beside the package for ``smoothk.info()``."""

    def run(self) -> None:
        mode = build_mode()
        in_place = self.inplace or self.editable_mode
        package = (ROOT if in_place else Path(self.build_lib)) / "smoothk"
        module = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        record: dict[str, str] = {"requested": mode}
        try:
            if mode == "cuda":
                raise CannotBuild("the CUDA kernels are not in this version; use cpu or auto")
            if mode == "none":
                raise CannotBuild("SMOOTHK_BUILD=none")
            record["torch"] = cmake_build(module, bool(self.debug))
        except CannotBuild as reason:
            if mode in ("cpu", "cuda"):
                sys.exit(f"smoothk: SMOOTHK_BUILD={mode} cannot be built: {reason}")
            module.unlink(missing_ok=True)  # an older build must not be picked up
            record["reason"] = str(reason)
            print(f"smoothk: pure Python, no extension: {reason}", file=sys.stderr)
        else:
            print(f"smoothk: built {module.name} against torch {record['torch']}", file=sys.stderr)
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


build_mode()  # a misspelt mode stops here, not after the downloads
setup(
    version=package_version(),
    # No sources: CMakeLists.txt has them. Optional: setuptools must not miss the file where nothing is compiled.
    ext_modules=[Extension("smoothk._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildExtension},
)
