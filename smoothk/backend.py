"""What can run here, why the rest cannot, and the one function that chooses.

Backends: ``torch`` (plain PyTorch, always there), ``cpp`` (the extension ``smoothk._C``), ``triton`` and ``cuda``.
Nothing is loaded before it is first asked for, and no environment variable is read.
"""

from __future__ import annotations

import importlib
import json
import platform
import sys
import threading
import warnings
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

NAMES = ("torch", "cpp", "triton", "cuda")

# Backends that implement each op, fastest first.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "difference_penalty": ("triton", "cpp", "torch"),
    "nuclear_norm": ("torch",),
    "polar_factors": ("triton", "torch"),  # the nuclear norm by Newton-Schulz
    "low_rank_conv": ("cuda", "cpp", "torch"),
}

# Not yet run on a GPU: taken only where asked for by name.
UNVERIFIED = {("difference_penalty", "triton"), ("polar_factors", "triton"), ("low_rank_conv", "cuda")}

# Of the weights that the kernels of an op take.
KERNEL_DTYPES = {
    "difference_penalty": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "polar_factors": (torch.float32, torch.bfloat16, torch.float16),
    "low_rank_conv": (torch.float32, torch.bfloat16, torch.float16),
}

# Types of tensors that hold their values in their own storage; a subclass (DTensor, FakeTensor, ...) may not.
PLAIN = (torch.Tensor, torch.nn.Parameter)

_lock = threading.RLock()
_reasons: dict[str, str | None] = {}  # backend -> why it is missing, None where it is there


class BackendUnavailable(RuntimeError):
    """A backend asked for by name cannot run this call; the message says why."""


def unavailable_reason(name: str) -> str | None:
    """Why the backend ``name`` cannot be used on this machine, or None where it can. The first call loads it."""
    if name not in _reasons:
        with _lock:
            if name not in _reasons:
                _reasons[name] = _LOADERS[name]()
    return _reasons[name]


def triton_device() -> str:
    """Type of the device whose tensors Triton's kernels take: ``"cuda"``, or ``"cpu"`` in Triton's interpreter."""
    return "cpu" if importlib.import_module("triton").knobs.runtime.interpret else "cuda"


# What torch.compiler.assume_constant_result sets, without its import of torch._dynamo: torch.compile must not trace
# the loading of an extension.
vars(unavailable_reason)["_dynamo_marked_constant"] = vars(triton_device)["_dynamo_marked_constant"] = True


def choose(op: str, backend: str | None, tensors: Sequence[torch.Tensor], grads: Sequence[torch.Tensor] = ()) -> str:
    """Name of the backend that runs ``op`` on ``tensors``.

    Args:
        op: a key of ``IMPLEMENTATIONS``.
        backend: None for the fastest that can run all the tensors (``"torch"`` always can), or one of ``NAMES``.
        tensors: every tensor of the call.
        grads: gradients of ``tensors`` that the call adds into.

    Raises:
        ValueError: ``backend`` is no backend's name.
        BackendUnavailable: the backend asked for by name cannot run this call.
    """
    if backend is None:
        candidates = [name for name in IMPLEMENTATIONS[op] if (op, name) not in UNVERIFIED]
        return next(name for name in candidates if _obstacle(op, name, tensors, grads) is None)
    if backend not in NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, NAMES))}, got {backend!r}")
    obstacle = _obstacle(op, backend, tensors, grads)
    if obstacle is not None:
        raise BackendUnavailable(f"backend {backend!r} cannot run {op}: {obstacle}")
    return backend


def _obstacle(op: str, name: str, tensors: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> str | None:
    """Why backend ``name`` cannot run ``op`` on ``tensors``, or None where it can."""
    if name == "torch":
        return unavailable_reason(name)
    if name not in IMPLEMENTATIONS[op]:
        return unavailable_reason(name) or f"it has no {op} kernel; use one of {', '.join(IMPLEMENTATIONS[op])}"
    if name in ("triton", "cuda"):  # loaded first: only then is Triton's device known
        reason = unavailable_reason(name)
        if reason is not None:
            return reason
        device = triton_device() if name == "triton" else "cuda"
    else:
        device = "cpu"
    return (
        _tensor_obstacle(tensors, device, KERNEL_DTYPES[op])
        or _tensor_obstacle(grads, device, KERNEL_DTYPES[op])
        or _dtype_obstacle(tensors, grads)
        or unavailable_reason(name)
    )


def _dtype_obstacle(tensors: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> str | None:
    if not grads or grads[0].dtype == tensors[0].dtype:
        return None
    if tensors[0].dtype.itemsize == 2 and grads[0].dtype == torch.float32:
        return None
    return f"it takes gradients of {tensors[0].dtype}, or float32 ones of half precision, got {grads[0].dtype}"


def in_transform() -> bool:
    """Whether torch.func's transforms or forward-mode differentiation are at work, which tensors do not say; not while
    torch.compile traces, which looks like one."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _tensor_obstacle(tensors: Sequence[torch.Tensor], device: str, dtypes: Sequence[torch.dtype]) -> str | None:
    transforms = not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
    on_cpu, strided = device == "cpu", torch.strided
    for tensor in tensors:
        if type(tensor) not in PLAIN:
            return f"it takes plain tensors, got {type(tensor).__name__}"
        if not (tensor.is_cpu if on_cpu else tensor.is_cuda) or tensor.layout is not strided:
            place = "the CPU" if on_cpu else "a CUDA device"
            return f"it takes dense tensors on {place}, got a {tensor.layout} tensor on {tensor.device}"
        if tensor.dtype not in dtypes:
            return f"it takes {', '.join(map(str, dtypes))}, got {tensor.dtype}"
        if tensor.dtype is not tensors[0].dtype:
            return f"it takes tensors of one dtype, got {tensors[0].dtype} and {tensor.dtype}"
        if transforms and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return "it does not run under torch.func transforms"
    if forward_ad._current_level >= 0:
        return "it has no forward-mode derivative"
    return None


def extension() -> ModuleType:
    """The module ``smoothk._C``, where the backend ``cpp`` is available."""
    return sys.modules["smoothk._C"]


def _load_torch() -> str | None:
    ops = importlib.import_module("smoothk.ops")
    ops.register_polar_factors(ops.TORCH, ops.reference.polar_factors)
    return None


def _load_cpp() -> str | None:
    record = _build_record()
    # Only in this package's own folder: from a second checkout, an editable install's finder would offer the first's.
    if PathFinder.find_spec("smoothk._C", sys.modules[__package__].__path__) is None:
        return f"the C++ extension is not built ({record.get('reason', 'this is a checkout without a build')})"
    try:
        importlib.import_module("smoothk._C")
    except ImportError as error:
        reason = (
            f"the C++ extension does not load: {error}; it was built against torch {record.get('torch', 'unknown')} "
            f"and this is {torch.__version__}: install smoothk again"
        )
        warnings.warn(reason, RuntimeWarning, stacklevel=2)
        return reason
    ops = importlib.import_module("smoothk.ops")
    ops.register("smoothk")
    ops.register_low_rank_conv()
    importlib.import_module("smoothk.low_rank_ops").register()
    return None


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    reason = unavailable_reason("cpp")  # which has the operators' schemas
    if reason is not None:
        return reason
    record = _build_record()
    if PathFinder.find_spec("smoothk._C_cuda", sys.modules[__package__].__path__) is None:
        return f"the CUDA extension is not built ({record.get('cuda_reason', 'this is a checkout without a build')})"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        importlib.import_module("smoothk._C_cuda")
    except ImportError as error:
        return f"the CUDA extension does not load: {error}; install smoothk again"
    return None


def _load_triton() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton does not import ({error})"
    if triton_device() == "cuda" and not torch.cuda.is_available():
        return "Triton is installed, but there is no CUDA device and Triton's interpreter (TRITON_INTERPRET=1) is off"
    importlib.import_module("smoothk.kernels.difference_ops")
    ops = importlib.import_module("smoothk.ops")
    ops.register("smoothk_triton")
    ops.register_polar_factors("smoothk_triton", importlib.import_module("smoothk.kernels.polar").polar_factors)
    return None


_LOADERS = {"torch": _load_torch, "cpp": _load_cpp, "cuda": _load_cuda, "triton": _load_triton}


def _build_record() -> dict[str, Any]:
    """What setup.py wrote about the last build: mode, torch version, and why nothing was compiled."""
    try:
        return json.loads((Path(__file__).parent / "_build.json").read_text())
    except (OSError, ValueError):
        return {}


class Info(dict):
    """Plain dict of versions and backends whose ``str()`` is a table."""

    def __str__(self) -> str:
        rows = []
        for key, value in self.items():
            if isinstance(value, dict):
                rows += [(f"{key}.{name}", entry) for name, entry in value.items()]
            else:
                rows.append((key, value))
        width = max(len(key) for key, _ in rows)
        return "\n".join(f"{key:<{width}}  {value}" for key, value in rows)


def info() -> Info:
    """Versions, threads, how the extension was built, and each backend: ``"available"`` or why not.

    The result is a dict that ``json.dumps`` takes; ``print(smoothk.info())`` shows it as a table.
    """
    from . import __version__

    backends = {name: unavailable_reason(name) or "available" for name in NAMES}
    extension = importlib.import_module("smoothk._C").build_info() if backends["cpp"] == "available" else {}
    if backends["cuda"] == "available":
        extension["cuda_architectures"] = importlib.import_module("smoothk._C_cuda").architectures
    return Info(
        smoothk=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda or "none",
        triton=_version("triton"),
        threads=torch.get_num_threads(),
        backends=backends,
        extension=extension,
    )


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
