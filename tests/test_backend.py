"""Which backend is chosen, why another is not, and what `smoothk.info` says about it."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import smoothk
from smoothk import backend
from smoothk.backend import BackendUnavailable, choose, unavailable_reason

cpp_missing = unavailable_reason("cpp")
needs_cpp = pytest.mark.skipif(cpp_missing is not None, reason=str(cpp_missing))
torch_deprecations = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of its own functions
FASTEST = "torch" if cpp_missing else "cpp"


class Subclass(Tensor):
    pass


def test_the_fastest_backend_that_can_run_is_chosen() -> None:
    for dtype in backend.KERNEL_DTYPES["difference_penalty"]:
        tensors = [torch.ones(3, dtype=dtype), torch.nn.Parameter(torch.ones(2, 2, dtype=dtype))]
        assert choose("difference_penalty", None, tensors) == FASTEST
    assert choose("difference_penalty", None, []) == FASTEST
    assert choose("nuclear_norm", None, [torch.ones(3, 3)]) == "torch"
    assert choose("low_rank_conv", None, [torch.ones(3, 3)]) == FASTEST
    assert choose("low_rank_conv", None, [torch.ones(3, 3).double()]) == "torch"


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([torch.ones(3, dtype=torch.float8_e5m2)], "float8_e5m2"),
        ([torch.ones(3), torch.ones(3).double()], "one dtype, got torch.float32 and torch.float64"),
        ([torch.ones(3), torch.ones(3, device="meta")], "on the CPU, got a torch.strided tensor on meta"),
        ([torch.ones(3, 3).to_sparse()], "got a torch.sparse_coo tensor on cpu"),
        ([torch.ones(3).as_subclass(Subclass)], "plain tensors, got Subclass"),
    ],
    ids=["float8", "mixed", "meta", "sparse", "subclass"],
)
def test_tensors_that_the_extension_cannot_take(tensors: list[Tensor], reason: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # automatic choice is quiet
        assert choose("difference_penalty", None, tensors) == "torch"
    with pytest.raises(BackendUnavailable, match=rf"^backend 'cpp' cannot run difference_penalty: .*{reason}"):
        choose("difference_penalty", "cpp", tensors)


def test_a_kernel_that_no_gpu_has_verified_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.UNVERIFIED == {
        ("difference_penalty", "triton"),
        ("polar_factors", "triton"),
        ("low_rank_conv", "cuda"),
    }
    monkeypatch.setitem(backend._reasons, "triton", None)
    monkeypatch.setattr(backend, "triton_device", lambda: "cpu")
    tensors = [torch.ones(3), torch.ones(2)]
    assert choose("difference_penalty", None, tensors) == FASTEST
    assert choose("difference_penalty", "triton", tensors) == "triton"
    monkeypatch.setattr(backend, "UNVERIFIED", set())
    assert choose("difference_penalty", None, tensors) == "triton"


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([torch.ones(3), torch.ones(3, device="meta")], "on a CUDA device, got a torch.strided tensor on cpu"),
        ([torch.ones(3).as_subclass(Subclass)], "plain tensors, got Subclass"),
    ],
    ids=["device", "subclass"],
)
def test_tensors_that_triton_cannot_take(tensors: list[Tensor], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend._reasons, "triton", None)
    monkeypatch.setattr(backend, "triton_device", lambda: "cuda")
    with pytest.raises(BackendUnavailable, match=f"^backend 'triton' cannot run difference_penalty: .*{reason}"):
        choose("difference_penalty", "triton", tensors)


def test_triton_without_a_gpu_and_without_its_interpreter_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(backend, "triton_device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device and Triton's interpreter (TRITON_INTERPRET=1) is off" in backend._load_triton()


def test_fake_tensors_go_to_torch() -> None:
    with FakeTensorMode():
        assert choose("difference_penalty", None, [torch.ones(3)]) == "torch"


@pytest.mark.parametrize(
    ("op", "name", "reason"),
    [
        ("difference_penalty", "cuda", "has no CUDA|not built|no CUDA device|no difference_penalty kernel"),
        ("low_rank_conv", "triton", "Triton|no low_rank_conv kernel; use one of cuda, cpp, torch"),
        ("nuclear_norm", "cpp", "not built|no nuclear_norm kernel; use one of torch"),
        ("low_rank_conv", "cuda", "has no CUDA|not built|no CUDA device|tensors on a CUDA device"),
    ],
)
def test_a_backend_asked_for_by_name_that_cannot_run_says_why(op: str, name: str, reason: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"^backend '{name}' cannot run {op}: .*({reason})"):
        choose(op, name, [torch.ones(3, 3)])


@pytest.mark.parametrize("name", ["CPP", "", "gpu", 3])
def test_an_unknown_name_lists_the_known_ones(name: object) -> None:
    with pytest.raises(ValueError, match=r"backend must be None or one of 'torch', 'cpp', 'triton', 'cuda', got"):
        choose("difference_penalty", name, [torch.ones(3)])


def test_a_missing_extension_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend._reasons, "cpp", "the C++ extension is not built (no C++ compiler found)")
    weight = torch.randn(4, 3)
    assert smoothk.difference_penalty(weight) == smoothk.difference_penalty(weight, backend="torch")
    with pytest.raises(BackendUnavailable, match="no C\\+\\+ compiler found"):
        smoothk.difference_penalty(weight, backend="cpp")


def test_a_backend_is_loaded_once_however_many_threads_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load() -> str:
        calls.append(1)
        time.sleep(0.05)
        return "slow to fail"

    monkeypatch.setitem(backend._LOADERS, "slow", load)
    monkeypatch.setattr(backend, "_reasons", {})
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(unavailable_reason, ["slow"] * 16)) == {"slow to fail"}
    assert len(calls) == 1


def penalty(weight: Tensor) -> Tensor:
    return smoothk.difference_penalty(weight, norm="huber")


@torch_deprecations
def test_function_transforms_run_in_torch() -> None:
    weights = torch.randn(5, 4, 3)
    torch.testing.assert_close(torch.func.vmap(penalty)(weights), torch.stack([penalty(w) for w in weights]))
    wanted = weights[0].clone().requires_grad_()
    penalty(wanted).backward()
    torch.testing.assert_close(torch.func.grad(penalty)(weights[0]), wanted.grad)
    value, tangent = torch.func.jvp(penalty, (weights[0],), (weights[1],))
    torch.testing.assert_close(tangent, (wanted.grad * weights[1]).sum())
    with torch.autograd.forward_ad.dual_level():
        assert choose("difference_penalty", None, [weights]) == "torch"


@torch_deprecations
def test_compiles_into_one_graph() -> None:
    weights = [torch.randn(6, 4, requires_grad=True), torch.randn(5, requires_grad=True)]
    compiled = torch.compile(lambda *w: smoothk.difference_penalty(w, norm="l21"), fullgraph=True, backend="aot_eager")
    value = smoothk.difference_penalty(weights, norm="l21")
    torch.testing.assert_close(compiled(*weights), value)
    for one, other in zip(*(torch.autograd.grad(v, weights) for v in (compiled(*weights), value)), strict=True):
        torch.testing.assert_close(one, other)


def test_info_is_plain_data_and_a_table() -> None:
    info = smoothk.info()
    assert json.loads(json.dumps(info)) == info
    assert info["smoothk"] == smoothk.__version__ and info["torch"] == torch.__version__
    assert list(info["backends"]) == list(backend.NAMES) and info["backends"]["torch"] == "available"
    lines = str(info).splitlines()
    assert any(line.split() == ["torch", torch.__version__] for line in lines)
    assert all(any(line.startswith(f"backends.{name} ") for line in lines) for name in backend.NAMES)


@needs_cpp
def test_info_says_how_the_extension_was_built() -> None:
    extension = smoothk.info()["extension"]
    assert extension["mode"] == "cpu" and extension["cxx_standard"] >= 20 and "-O" in extension["flags"]
    assert extension["compiler"].split()[0] in ("gcc", "clang")
    assert extension["torch"].split(".")[0] == "2"


def test_an_extension_that_does_not_load_warns_once_and_is_explained(bare_package: Path) -> None:
    (bare_package / "smoothk" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"built for another machine")
    script = """
import json, warnings
import torch, smoothk
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    values = [smoothk.difference_penalty(torch.eye(4)) for _ in range(3)]
assert values[0] == 6, values
try:
    smoothk.difference_penalty(torch.eye(4), backend="cpp")
except smoothk.BackendUnavailable as error:
    message = str(error)
print(json.dumps([[str(w.message) for w in caught], message, smoothk.info()["backends"]["cpp"]]))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=bare_package, check=True, capture_output=True, text=True)
    warned, raised, shown = json.loads(done.stdout)
    assert warned == [shown] and raised.endswith(shown)
    assert "does not load" in shown and torch.__version__ in shown and "install smoothk again" in shown
