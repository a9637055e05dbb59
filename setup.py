"""Metadata is in pyproject.toml; this file compiles csrc/ with CMake against the torch that is already installed.

The environment variable SMOOTHK_BUILD decides what is compiled:

- ``auto`` (default): what the installed torch and compilers allow; pure Python with a printed reason where they do not.
- ``cpu``: the kernels for the CPU, or an error; ``cuda``: those and the ones for CUDA, or an error.
- ``none``: nothing; an extension left in place by an earlier build is removed.

The kernels for CUDA are compiled for the architectures in TORCH_CUDA_ARCH_LIST, by default for 8.0, 9.0 and 10.0.
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


def find_nvcc() -> str:
    candidates = [os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next(filter(None, map(shutil.which, filter(None, candidates))), None)
    if found is None:
        raise CannotBuild("nvcc not found; put it on PATH, or its path into CUDACXX")
    return found


def cuda_architectures(nvcc: str) -> str:
    """As CMake writes them: machine code for each, and of the last or where asked for with +PTX also that."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    numbers = [found for found in ("80", "90", "100") if f"compute_{found}\n" in known]
    asked = re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if asked != [""]:
        numbers = [name.replace(".", "").removesuffix("+PTX") + "+PTX" * name.endswith("+PTX") for name in asked]
    elif numbers:
        numbers[-1] += "+PTX"
    if not numbers:
        raise CannotBuild(f"{nvcc} compiles for none of 8.0, 9.0 and 10.0; name others in TORCH_CUDA_ARCH_LIST")
    if not all(re.fullmatch(r"\d+[af]?(\+PTX)?", number) for number in numbers):
        raise CannotBuild(f"TORCH_CUDA_ARCH_LIST must be numbers such as '8.0;9.0+PTX', got {' '.join(asked)}")
    return ";".join(number.removesuffix("+PTX") + "-real" * ("+PTX" not in number) for number in numbers)


def cuda_options() -> list[str]:
    """Options of CMake for the CUDA kernels."""
    torch = find_torch()
    if torch.version.cuda is None:
        raise CannotBuild(f"torch {torch.__version__} has no CUDA")
    nvcc = find_nvcc()
    version = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.\d+", version)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        raise CannotBuild(
            f"torch {torch.__version__} wants nvcc {torch.version.cuda}, and {nvcc} is of another release"
        )
    return [
        "-DSMOOTHK_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DCMAKE_CUDA_ARCHITECTURES={cuda_architectures(nvcc)}",
    ]


def cmake_build(module: Path, debug: bool, options: tuple[str, ...] = ("-DSMOOTHK_CUDA=OFF",)) -> str:
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
        *options,
    ]
    if ninja := shutil.which("ninja"):  # named every time: the cached one may lie in a build environment now gone
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    target = module.name.partition(".")[0]
    for command in (configure, ["cmake", "--build", str(build), "--parallel", "--target", target]):
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise CannotBuild(f"`{' '.join(command[:4])}` failed, its output is above") from error
    module.parent.mkdir(parents=True, exist_ok=True)
    beside = module.with_suffix(".new")
    shutil.copy2(build / module.name, beside)
    beside.replace(module)  # a process that has loaded the old one keeps it
    return torch.__version__


class BuildExtension(build_ext):
    """Replaces setuptools' compilation; leaves a record of the outcome beside the package for ``smoothk.info()``."""

    def run(self) -> None:
        mode = build_mode()
        in_place = self.inplace or self.editable_mode
        package = (ROOT if in_place else Path(self.build_lib)) / "smoothk"
        module, cuda_module = (
            package / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in ("_C", "_C_cuda")
        )
        debug = bool(self.debug)
        record: dict[str, str] = {"requested": mode}
        try:
            if mode == "none":
                raise CannotBuild("SMOOTHK_BUILD=none")
            options = cuda_options() if mode == "cuda" else []
            record["torch"] = cmake_build(module, debug)
        except CannotBuild as reason:
            if mode in ("cpu", "cuda"):
                sys.exit(f"smoothk: SMOOTHK_BUILD={mode} cannot be built: {reason}")
            module.unlink(missing_ok=True)  # an older build must not be picked up
            cuda_module.unlink(missing_ok=True)
            record["reason"] = record["cuda_reason"] = str(reason)
            print(f"smoothk: pure Python, no extension: {reason}", file=sys.stderr)
        else:
            print(f"smoothk: built {module.name} against torch {record['torch']}", file=sys.stderr)
            self.build_cuda(cuda_module, debug, options, record)
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.json").write_text(json.dumps(record) + "\n", encoding="utf-8")

    def build_cuda(self, module: Path, debug: bool, options: list[str], record: dict[str, str]) -> None:
        """The kernels for CUDA; ``options`` are there where they have to be built."""
        try:
            if record["requested"] == "cpu":
                raise CannotBuild("SMOOTHK_BUILD=cpu")
            cmake_build(module, debug, tuple(options or cuda_options()))
        except CannotBuild as reason:
            if record["requested"] == "cuda":
                sys.exit(f"smoothk: SMOOTHK_BUILD=cuda cannot be built: {reason}")
            module.unlink(missing_ok=True)
            record["cuda_reason"] = str(reason)
            print(f"smoothk: no CUDA kernels: {reason}", file=sys.stderr)
        else:
            print(f"smoothk: built {module.name}", file=sys.stderr)


build_mode()  # a misspelt mode stops here, not after the downloads
setup(
    version=package_version(),
    # No sources: CMakeLists.txt has them. Optional: setuptools must not miss the file where nothing is compiled.
    ext_modules=[Extension("smoothk._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildExtension},
)
