"""Packaging: what is imported, what is installed, and that a build that is possible has been made."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import sass
import torch

import smoothk
from smoothk.backend import unavailable_reason

ROOT = Path(smoothk.__file__).resolve().parent.parent
HEAVY = ("sklearn", "matplotlib", "tqdm", "PIL", "safetensors", "triton", "torch._dynamo", "torch._inductor")


def run(script: str, cwd: Path, *options: str) -> str:
    done = subprocess.run([sys.executable, *options, "-c", script], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_without_an_extension(bare_package: Path) -> None:
    script = """
import smoothk, smoothk.kernels, smoothk.recipes, torch
from smoothk.backend import unavailable_reason
assert smoothk.kernels.__name__ == "smoothk.kernels"
value = smoothk.difference_penalty(torch.eye(4))
assert value == 6, value
print(smoothk.__file__, unavailable_reason("cpp"), sep="|")
"""
    file, reason = run(script, bare_package, "-W", "error").strip().split("|")
    assert Path(file).parent == bare_package / "smoothk"
    assert reason == "the C++ extension is not built (this is a checkout without a build)"


def test_import_is_light(tmp_path: Path) -> None:
    script = f"""
import sys, time, torch
before = set(sys.modules)
start = time.process_time()  # not the wall clock: other processes may be busy
import smoothk
seconds = time.process_time() - start
heavy = [name for name in {HEAVY} if name in set(sys.modules) - before]
assert not heavy, heavy
print(seconds)
"""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # As installed: compiled once, by the first of the runs, and not measured by coverage.
    unwanted = ("PYTHONDONTWRITEBYTECODE", "COVERAGE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    seconds = [
        float(
            subprocess.run(
                [sys.executable, "-c", script],
                cwd=tmp_path,
                env={**environment, "PYTHONPATH": path},
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for _ in range(4)
    ]
    assert min(seconds) <= 0.05, seconds


def test_a_build_that_is_possible_was_made() -> None:
    record = ROOT / "smoothk" / "_build.json"
    if not record.is_file():
        pytest.skip("not an installed checkout")
    requested = json.loads(record.read_text())["requested"]
    if requested == "none":
        assert "SMOOTHK_BUILD=none" in unavailable_reason("cpp")
        return
    compiler = any(map(shutil.which, ("c++", "g++", "clang++")))
    headers = (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()
    if requested == "cpu" or (compiler and headers):
        assert unavailable_reason("cpp") is None
    else:
        assert json.loads(record.read_text())["reason"] in unavailable_reason("cpp")


@pytest.mark.skipif(unavailable_reason("cpp") is not None, reason=str(unavailable_reason("cpp")))
def test_the_extension_needs_nothing_of_torch_but_its_stable_abi() -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    extension = sys.modules["smoothk._C"].__file__
    listing = subprocess.run(["nm", "-D", "--undefined-only", extension], check=True, capture_output=True, text=True)
    names = {line.split()[-1] for line in listing.stdout.splitlines()}
    assert "torch_library_impl" in names
    assert not [name for name in names if re.match(r"_Z(T\w)?N?K?(2at|3c10|5torch)", name)]


def setup_py(cwd: Path, *arguments: str, mode: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("setuptools", minversion="77")
    environment = {**os.environ, "SMOOTHK_BUILD": mode}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_an_unknown_build_mode_lists_the_known_ones() -> None:
    done = setup_py(ROOT, "--version", mode="fast")
    assert done.returncode != 0
    assert done.stderr.strip() == "SMOOTHK_BUILD must be one of auto, cpu, cuda, none, got 'fast'"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_cuda_is_refused_without_touching_an_earlier_build(checkout: Path) -> None:
    module = checkout / "smoothk" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    module.write_bytes(b"an earlier build")
    done = setup_py(checkout, "build_ext", "--inplace", mode="cuda")
    assert done.returncode != 0
    assert done.stderr.endswith(f"smoothk: SMOOTHK_BUILD=cuda cannot be built: torch {torch.__version__} has no CUDA\n")
    assert module.read_bytes() == b"an earlier build"


@pytest.mark.parametrize(
    ("release", "architectures", "reason"),
    [
        ("12.4", "", "torch 2.11.0+cu130 wants nvcc 13.0, and {nvcc} is of another release"),
        ("13.0", "newest", "TORCH_CUDA_ARCH_LIST must be numbers such as '8.0;9.0+PTX', got newest"),
    ],
)
def test_cuda_that_cannot_be_compiled(
    checkout: Path, release: str, architectures: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "torch").mkdir()
    (checkout / "torch" / "__init__.py").write_text(
        "from types import SimpleNamespace\n__version__, version = '2.11.0+cu130', SimpleNamespace(cuda='13.0')\n"
    )
    nvcc = checkout / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\necho compute_90\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
    monkeypatch.setenv("PYTHONPATH", str(checkout), prepend=os.pathsep)
    done = setup_py(checkout, "build_ext", "--inplace", mode="cuda")
    assert done.returncode != 0
    assert done.stderr.endswith(f"smoothk: SMOOTHK_BUILD=cuda cannot be built: {reason.format(nvcc=nvcc)}\n")


@pytest.mark.slow
@pytest.mark.skipif(unavailable_reason("cpp") is not None, reason=str(unavailable_reason("cpp")))
@pytest.mark.skipif(shutil.which("nvcc") is None or sass.cuobjdump() is None, reason="needs nvcc and cuobjdump")
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA: it builds the module itself")
def test_the_module_for_cuda_is_compiled_for_every_architecture(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With this torch's headers, which are those of one with CUDA; to be loaded it would need the libraries."""
    pytest.importorskip("pybind11")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # cmake, ninja
    known = subprocess.run(["nvcc", "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    if "compute_100\n" not in known:
        pytest.skip("this nvcc does not know sm_100")
    release = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    cuda = re.search(r"release (\d+\.\d+)", release)[1]
    (checkout / "torch").mkdir()
    (checkout / "torch" / "__init__.py").write_text(
        "from types import SimpleNamespace\n"
        f"__file__, __version__, version = {torch.__file__!r}, {torch.__version__!r}, SimpleNamespace(cuda={cuda!r})\n"
    )
    subprocess.run(["c++", "-shared", "-xc++", "/dev/null", "-o", checkout / "libtorch_cuda.so"], check=True)
    monkeypatch.setenv("LIBRARY_PATH", str(checkout))
    monkeypatch.setenv("PYTHONPATH", str(checkout), prepend=os.pathsep)
    for name in ("TORCH_CUDA_ARCH_LIST", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    done = setup_py(checkout, "build_ext", "--inplace", mode="cuda")
    assert done.returncode == 0, done.stderr[-2000:]
    (module,) = (checkout / "smoothk").glob("_C_cuda*.so")
    listing = subprocess.run([sass.cuobjdump(), "-lelf", "-lptx", module], check=True, capture_output=True, text=True)
    found = set(re.findall(r"\.(sm_\d+)\.(cubin|ptx)", listing.stdout))
    assert found == {("sm_80", "cubin"), ("sm_90", "cubin"), ("sm_100", "cubin"), ("sm_100", "ptx")}
    assert b"80-real 90-real 100" in module.read_bytes()  # what smoothk.info() tells


def test_none_removes_an_earlier_build(checkout: Path) -> None:
    modules = [checkout / "smoothk" / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in ("_C", "_C_cuda")]
    for module in modules:
        module.write_bytes(b"an earlier build")
    done = setup_py(checkout, "build_ext", "--inplace", mode="none")
    assert done.returncode == 0, done.stderr
    assert not any(module.exists() for module in modules)
    assert "(SMOOTHK_BUILD=none)" in run("import smoothk.backend as b; print(b.unavailable_reason('cpp'))", checkout)


@pytest.mark.parametrize("mode", ["auto", "cpu"])
def test_no_compiler(checkout: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    done = setup_py(checkout, "build_ext", "--inplace", mode=mode)
    reason = "no C++ compiler found (looked for /nowhere/c++)"
    assert reason in done.stderr
    assert (done.returncode == 0) == (mode == "auto")
    if mode == "auto":
        assert json.loads((checkout / "smoothk" / "_build.json").read_text())["reason"] == reason


def test_wheel_and_source_distribution(checkout: Path, tmp_path: Path) -> None:
    done = setup_py(
        checkout, "-q", "sdist", "--dist-dir", str(tmp_path), "bdist_wheel", "--dist-dir", str(tmp_path), mode="none"
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    assert "smoothk/py.typed" in names
    packages = ("integrations", "kernels", "recipes", "recipes/baselines")
    assert {f"smoothk/{package}/__init__.py" for package in packages} <= names
    assert not any(name.startswith(("csrc", "tests", "kernels")) or name.endswith(".so") for name in names)
    script = """
import smoothk, smoothk.kernels, torch
model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3))
small = smoothk.compress(model, keep=0.5).model
print(smoothk.__version__, sum(p.numel() for p in small.parameters()), sum(p.numel() for p in model.parameters()))
"""
    version, kept, full = run(script, tmp_path / "installed").split()
    assert version == smoothk.__version__ and version in wheel.name and 0 < int(kept) <= int(full) // 2

    (source,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(source, tmp_path)
    unpacked = tmp_path / source.name.removesuffix(".tar.gz")
    for file in ("CMakeLists.txt", "csrc/difference.h", "csrc/cpu/difference.cpp", "kernels/__init__.py", "LICENSE"):
        assert (unpacked / file).is_file(), file
    assert not list(unpacked.rglob("*.so")) and not (unpacked / "smoothk" / "_build.json").exists()
