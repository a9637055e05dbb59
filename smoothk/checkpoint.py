"""Files: compressed models as safetensors, written atomically, read without unpickling anything.

A file holds the tensors of the model's state dict and, under the metadata key ``smoothk``, a JSON object with the
format's ``version``, the ``plan`` (each low-rank layer's shape, groups, scheme and rank), the ``methods`` of the layers
that have one other than ``"auto"``, the names of ``tied`` tensors, and a ``sha256`` over all of it: safetensors itself
does not notice a changed byte.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from .compress import empty_low_rank_layer, planned_layers, replace_layers
from .copies import deep_copy
from .inference import is_optimized
from .layers import _LowRank
from .low_rank_conv import check_method
from .modes import outside_inference_mode
from .rank_plan import LayerPlan, RankPlan

FORMAT_VERSION = 1
MODEL_FILE = "model.safetensors"  # its name in a folder, that of Hugging Face
_KEY = "smoothk"


class CheckpointError(ValueError):
    """A file is truncated, altered, or of another kind or model; the message names it."""


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model, compressed or not, to a safetensors file.

    The write is atomic: a crash leaves the old file or the new one. Tied parameters are written once.

    Args:
        model: any module whose state dict holds tensors only, none of them on the meta device.
        path: the file to write or replace.

    Raises:
        TypeError: ``model`` is not a module, or comes from `optimize_for_inference`, or its state dict holds something
            other than the dense tensors of parameters, buffers and extra states.
        ValueError: a tensor is on the meta device.
        OSError: the file cannot be written; an existing one is intact.
    """
    import safetensors.torch

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if is_optimized(model):
        raise TypeError("model must be what optimize_for_inference was given, got what it made, which no load can read")
    tensors, tied = _unique_tensors(model)
    header = {"version": FORMAT_VERSION, "plan": json.loads(_plan_of(model).to_json()), "tied": tied}
    if methods := _methods_of(model):
        header["methods"] = methods
    header["sha256"] = _digest(header, tensors)
    atomic_write(path, safetensors.torch.save(tensors, metadata={_KEY: json.dumps(header)}))


@outside_inference_mode
def load(model_or_factory: nn.Module | Callable[[], nn.Module], path: str | os.PathLike[str]) -> nn.Module:
    """Read a file written by `save` into a new model.

    Args:
        model_or_factory: the dense model (which is not changed), or a function that makes it, called once; it may be
            on the meta device, and may have some of the file's low-rank layers already.
        path: the file, or a folder with ``model.safetensors``.

    Returns:
        A new model with the file's low-rank layers, values and dtypes, on the devices of the given model (on the CPU
        where that is meta), in its training modes and with its ``requires_grad`` flags.

    Raises:
        CheckpointError: the file is truncated, altered, not a smoothk file, or of another model; it is named.
        FileNotFoundError, OSError: the file is missing or cannot be read.
        TypeError: ``model_or_factory`` is neither a module nor gives one.
    """
    model = model_or_factory if isinstance(model_or_factory, nn.Module) else None
    if model is None and not callable(model_or_factory):
        raise TypeError(f"model_or_factory must be a module or a function, got {type(model_or_factory).__name__}")
    plan, methods, tensors = read(Path(path))
    dense = deep_copy(model) if model is not None else model_or_factory()
    if not isinstance(dense, nn.Module):
        raise TypeError(f"model_or_factory must give a torch.nn.Module, got {type(dense).__name__}")
    try:
        there = _plan_of(dense).layers  # low-rank layers that the model has already
        plan = replace(plan, layers={name: layer for name, layer in plan.layers.items() if there.get(name) != layer})
        layers = planned_layers(dense, plan)
        small = replace_layers(dense, {n: empty_low_rank_layer(m, plan.layers[n]) for n, m in layers.items()})
        _assign(small, tensors)
        for name, method in methods.items():
            layer = small.get_submodule(name)
            assert isinstance(layer, _LowRank)  # `read` has seen to it
            layer.method = method
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} does not fit the model: {error}") from None
    return small


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace ``path`` by ``data`` so that a crash at any moment leaves either the old file or the new one.

    A symbolic link stays, and what it points to is replaced; devices and pipes are written to.

    Raises:
        OSError: the directory does not exist or cannot be written, or the disk is full; it names ``path``, and the old
            file is intact.
    """
    path = Path(path)
    try:
        if path.is_file() or not path.exists():
            target = Path(os.path.realpath(path))
            if target.is_symlink():
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            _atomic_write(target, data)
        else:
            path.write_bytes(data)
    except OSError as error:
        # A full disk names no file, and the others name one that the caller does not know.
        raise OSError(error.errno, error.strerror, str(path)) from error


def _atomic_write(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # mkstemp's 0600 would hide the file from the group
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself has to survive a crash
    finally:
        os.close(directory)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict without repeats, contiguous on the CPU, and ``{repeated name: first name}``."""
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    places = _places(model)
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise TypeError(f"model's state dict must hold tensors only, got {type(value).__name__} for {name!r}")
        if value.is_meta:
            raise ValueError(f"model must hold values, but {name!r} is on the meta device")
        too_wide = value.is_complex() and value.dtype is not torch.complex64
        if value.layout is not torch.strided or value.is_quantized or too_wide:
            kind = f"{value.layout} tensor of {value.dtype}"
            raise TypeError(f"model's state dict must hold what safetensors can, got a {kind} for {name!r}")
        if name not in places:
            raise TypeError(f"model's state dict must hold parameters, buffers and extra states, got {name!r}")
        if id(value) in first:
            tied[name] = first[id(value)]
        else:
            first[id(value)] = name
            # A copy of its own: safetensors refuses tensors that share memory.
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
    return tensors, tied


def _places(model: nn.Module) -> set[str]:
    """The names in a state dict that `_assign` can give a value to."""
    places = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        keys = [*module._parameters, *module._buffers, _EXTRA_STATE_KEY_SUFFIX]
        places |= {f"{prefix}.{key}" if prefix else key for key in keys}
    return places


def _plan_of(model: nn.Module) -> RankPlan:
    """The plan that describes the low-rank layers which ``model`` has."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, _LowRank):
            shape, groups = tuple(module.weight_shape), getattr(module, "groups", 1)
            scheme, factors = getattr(module, "scheme", "channel"), module.v.numel() + module.u.numel()
            layers[name] = LayerPlan(shape, groups, scheme, module.rank, math.prod(shape), factors)
    kept = sum(p.numel() for p in model.parameters())
    before = kept + sum(layer.parameters_before - layer.parameters for layer in layers.values())
    return RankPlan("saved", "params", kept / max(before, 1), before, kept, layers=layers)


def _methods_of(model: nn.Module) -> dict[str, str]:
    """How the low-rank layers are computed, where that is not left to smoothk."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _LowRank)}
    return {name: layer.method for name, layer in layers.items() if layer.method != "auto"}


def _digest(header: Mapping[str, object], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the header (its own digest left out) and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps({k: v for k, v in header.items() if k != "sha256"}, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_smoothk_file(path: str | os.PathLike[str]) -> bool:
    """Whether `load` is the one to read ``path``, or to say what is wrong with it: False for a sound safetensors file
    of another program."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return _KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return True


def read(path: Path) -> tuple[RankPlan, dict[str, str], dict[str, Tensor]]:
    """Plan, methods and tensors of a file or folder, tied names included, every byte of it checked.

    Raises:
        CheckpointError, FileNotFoundError, OSError: as `load`.
    """
    from safetensors import SafetensorError, safe_open

    path = path / MODEL_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                raise CheckpointError(f"{path} was not written by smoothk.save")
            header = json.loads(metadata[_KEY])
            if not isinstance(header, dict) or header.get("version") != FORMAT_VERSION:
                raise CheckpointError(f"{path} must have format version {FORMAT_VERSION}")
            # Copies: what safetensors gives lies in the mapped file, which may change, and is not aligned.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # safe_open is no mapping
        if header.get("sha256") != _digest(header, tensors):
            raise CheckpointError(f"{path} is damaged: its contents do not match its checksum")
        plan = RankPlan.from_json(json.dumps(header["plan"]))
        tensors.update({name: tensors[first] for name, first in header["tied"].items()})
        methods = header.get("methods", {})
        if any(name not in plan.factorized for name in methods):
            raise CheckpointError(f"{path} is damaged: it has a method for a layer that is not low-rank")
        for method in methods.values():
            check_method(method)
    except CheckpointError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or not a smoothk file: {error}") from None
    return plan, methods, tensors


def _assign(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give ``model`` the tensors, names and shapes strictly; dtypes follow the file, ties and flags the model."""
    wanted = model.state_dict(keep_vars=True)
    missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or unexpected:
        raise ValueError(f"missing {missing[:3]}, unexpected {unexpected[:3]}")
    unknown = sorted(wanted.keys() - _places(model))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is neither a parameter nor a buffer nor an extra state of the model")
    in_file: dict[int, int] = {}
    in_model: dict[int, int] = {}
    for name, value in wanted.items():
        tensor = tensors[name]
        if name.rpartition(".")[2] == _EXTRA_STATE_KEY_SUFFIX:  # made anew by every call, of any size
            continue
        if value.shape != tensor.shape:
            raise ValueError(f"{name!r} must have shape {list(value.shape)}, got {list(tensor.shape)}")
        pair = id(value), id(tensor)
        if (in_file.setdefault(*pair), in_model.setdefault(*reversed(pair))) != pair[::-1]:
            raise ValueError(f"{name!r} is tied to another tensor either in the file or in the model, but not in both")
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_meta and name not in tensors:
            raise ValueError(f"{name!r} is not in the file and has no value on the meta device")
    new: dict[int, Tensor] = {}
    for prefix, module in model.named_modules():
        for slots in (module._parameters, module._buffers):
            for key, old in slots.items():
                name = f"{prefix}.{key}" if prefix else key
                if old is None or name not in tensors:
                    continue
                if id(old) not in new:
                    value = tensors[name] if old.is_meta else tensors[name].to(old.device)
                    new[id(old)] = nn.Parameter(value, old.requires_grad) if slots is module._parameters else value
                slots[key] = new[id(old)]
    for prefix, module in model.named_modules():
        extra = f"{prefix}.{_EXTRA_STATE_KEY_SUFFIX}" if prefix else _EXTRA_STATE_KEY_SUFFIX
        if extra in tensors:
            try:
                module.set_extra_state(tensors[extra])
            except Exception as error:
                raise ValueError(f"{extra!r} is refused by the model: {error}") from error
