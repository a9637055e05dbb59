"""The wheel with the extension: what is in it, how large it is, and that it works without what is optional."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import NOT_COPIED, ROOT

import smoothk
from smoothk.backend import unavailable_reason

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(unavailable_reason("cpp") is not None, reason=str(unavailable_reason("cpp"))),
]
MOST_BYTES = 5_000_000  # installed, without CUDA
OPTIONAL = ("triton", "matplotlib", "sklearn", "tqdm", "PIL", "setuptools")

Run = Callable[..., str]


def pip(*arguments: str | Path, cwd: Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    environment = {**os.environ, "SMOOTHK_BUILD": "cpu"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``pip wheel`` makes of a clean copy of the checkout, the extension compiled."""
    checkout, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for name in ("smoothk", "kernels", "csrc"):
        shutil.copytree(ROOT / name, checkout / name, ignore=NOT_COPIED)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, checkout)
    pip("wheel", ".", "--no-deps", "--wheel-dir", out, cwd=checkout)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory into which pip has installed it."""
    site = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--target", site, wheel, cwd=site)
    return site


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Run:
    """Runs a command in another directory, with the installed package ahead of the checkout's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    environment["PYTHONPATH"] = str(installed)

    def call(*command: str | Path) -> str:
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return call


def script(text: str, blocked: tuple[str, ...] = ()) -> tuple[str, ...]:
    """A command that runs ``text`` while the modules ``blocked`` do not import."""
    head = f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n" if blocked else ""
    return sys.executable, "-W", "error", "-c", head + text


def test_it_holds_the_package_the_extension_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    metadata = f"smoothk-{smoothk.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"smoothk", metadata}
    kinds = {name.rpartition(".")[2] for name in names if name.startswith("smoothk/")}
    assert kinds == {"py", "typed", "json", "so"}
    assert [name for name in names if name.endswith(".so")] == [f"smoothk/_C{sysconfig.get_config_var('EXT_SUFFIX')}"]
    wanted = {"py.typed", "_build.json", "kernels/polar.py", "recipes/demo.py"}
    assert {f"smoothk/{name}" for name in wanted} <= set(names)
    assert any(name.startswith(f"{metadata}/") and name.endswith("LICENSE") for name in names)


def test_it_is_for_this_python_and_platform(wheel: Path) -> None:
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert re.fullmatch(rf"smoothk-{re.escape(smoothk.__version__)}-{python}-{python}-linux_\w+\.whl", wheel.name)


def test_installed_it_is_small(installed: Path) -> None:
    files = [path for path in (installed / "smoothk").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES


def test_the_extension_looks_for_libraries_nowhere_in_particular(installed: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    (extension,) = (installed / "smoothk").glob("_C*.so")
    dynamic = subprocess.run(["readelf", "-d", str(extension)], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in dynamic and "PATH)" not in dynamic


SCRIPT = """
import smoothk, torch
from smoothk.backend import unavailable_reason
weight = torch.randn(8, 8, requires_grad=True)
ours = smoothk.difference_penalty(weight, backend="cpp")
torch.testing.assert_close(ours, smoothk.difference_penalty(weight, backend="torch"))
model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3)).eval()
x = torch.randn(1, 3, 12, 12)
small = smoothk.compress(model, keep=0.6).model
smoothk.save(small, "small.safetensors")
again = smoothk.load(model, "small.safetensors")
with torch.inference_mode():
    torch.testing.assert_close(again(x), small(x))
    torch.testing.assert_close(smoothk.optimize_for_inference(small)(x), small(x), rtol=1e-4, atol=1e-5)
print(smoothk.__file__, unavailable_reason("triton"), sep="|")
"""


def test_it_works_from_another_directory(run: Run, installed: Path) -> None:
    file, _ = run(*script(SCRIPT)).split("|")
    assert Path(file) == installed / "smoothk" / "__init__.py"


def test_it_works_without_what_is_optional(run: Run, installed: Path) -> None:
    file, reason = run(*script(SCRIPT, OPTIONAL)).split("|")
    assert Path(file).is_relative_to(installed) and reason.startswith("Triton does not import")


def test_what_is_optional_is_asked_for_in_one_line(run: Run) -> None:
    text = """
from smoothk.recipes.figures import check_matplotlib
try:
    check_matplotlib()
except ImportError as error:
    print(error)
"""
    assert run(*script(text, OPTIONAL)) == "figures need matplotlib: pip install matplotlib"


def test_the_command_tells_its_version(run: Run, installed: Path) -> None:
    assert run(installed / "bin" / "smoothk", "--version") == f"smoothk {smoothk.__version__}"
