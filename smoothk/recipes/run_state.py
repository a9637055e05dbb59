"""The checkpoint of a training run: one file, written in one atomic step, in which nothing is ever unpickled.

A line that names the format, a SHA-256 of what follows, and a safetensors file: the model's state dict, that of the
optimizer and the random states; configuration, images and history as JSON in its metadata.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smoothk.checkpoint import CheckpointError, atomic_write

MAGIC = b"smoothk run 2\n"
RECORD = ("epoch", "lr", "loss", "penalty", "train_accuracy", "test_accuracy", "seconds")
_HEADER = len(MAGIC) + hashlib.sha256().digest_size
_KEY = "smoothk-run"
_KEPT = {torch.optim.SGD: {"momentum_buffer"}, torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}}


@dataclass
class RunState:
    """What a run is between two epochs.

    Attributes:
        config: its configuration as JSON-able values.
        data: provenance of its images.
        history: one record per epoch, with the fields of `RECORD`.
        tensors: by name: ``model.*``, ``optimizer.KEY.*`` for the parameters that the optimizer has seen, ``rng.cpu``
            and, where the run is on a GPU, ``rng.cuda``.
    """

    config: dict[str, Any]
    data: dict[str, Any]
    history: list[dict[str, float]]
    tensors: dict[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors whose names start with ``name.``, without that."""
        return {key[len(name) + 1 :]: value for key, value in self.tensors.items() if key.startswith(f"{name}.")}


def write_state(path: Path, state: RunState) -> None:
    """Write the checkpoint of a run; an error leaves the file as it was.

    Raises:
        OSError: the file cannot be written.
    """
    import safetensors.torch

    tensors, orders = {}, {}
    for name, tensor in state.tensors.items():
        # In the order in which its entries lie in memory: what is computed from them may depend on it in the last bit.
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        tensors[name] = tensor.detach().permute(order).to("cpu", copy=True).contiguous()
        if order != sorted(order):
            orders[name] = order
    header = {"config": state.config, "data": state.data, "history": state.history, "orders": orders}
    payload = safetensors.torch.save(tensors, metadata={_KEY: json.dumps(header)})
    atomic_write(path, MAGIC + hashlib.sha256(payload).digest() + payload)


def read_state(path: str | Path) -> RunState:
    """Read a checkpoint of a run; its SHA-256 is checked before it is parsed.

    Raises:
        CheckpointError: the file is truncated, changed, or no checkpoint of a run.
        OSError: it cannot be read.
    """
    import safetensors.torch

    path = Path(path)
    content = path.read_bytes()
    if not content.startswith(MAGIC) or len(content) < _HEADER:
        raise CheckpointError(f"{path}: not a smoothk run checkpoint, or cut off in its header ({len(content)} bytes)")
    payload = content[_HEADER:]
    if hashlib.sha256(payload).digest() != content[len(MAGIC) : _HEADER]:
        raise CheckpointError(f"{path}: its content does not match its SHA-256: it is truncated or changed")
    try:
        tensors = safetensors.torch.load(payload)
        (size,) = struct.unpack("<Q", payload[:8])
        header = json.loads(json.loads(payload[8 : 8 + size])["__metadata__"][_KEY])
        for name, order in header["orders"].items():
            tensors[name] = tensors[name].permute([order.index(axis) for axis in range(len(order))])
        state = RunState(header["config"], header["data"], header["history"], tensors)
        _check(state)
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint: {' '.join(str(error).split())[:200]}") from None
    return state


def _check(state: RunState) -> None:
    if not (isinstance(state.config, dict) and isinstance(state.data, dict) and isinstance(state.history, list)):
        raise ValueError("config and data must be objects and history a list")
    for record in state.history:
        numbers = isinstance(record, dict) and all(type(value) in (int, float) for value in record.values())
        if not numbers or tuple(record) != RECORD:
            raise ValueError(f"every record of the history must have the numbers {', '.join(RECORD)}")


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer keeps of each parameter, as ``KEY.PARAMETER``."""
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def restore(state: RunState, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Give the model, the optimizer and the random number generators the values of ``state``.

    Raises:
        ValueError: they do not fit; the model and the generators may have changed by then.
    """
    parameters, rng = dict(model.named_parameters()), state.part("rng")
    kept: dict[str, dict[str, Tensor]] = {}
    for key, value in state.part("optimizer").items():
        key, _, name = key.partition(".")
        kept.setdefault(name, {})[key] = value
    for name, values in kept.items():
        _check_kept(name, values, parameters.get(name), optimizer)
    try:
        model.load_state_dict(state.part("model"))
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], device)
    except (RuntimeError, TypeError, KeyError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None
    for name, values in kept.items():
        device = parameters[name].device
        # Copies in memory of torch's own: what safetensors reads need not be aligned. Steps are counted on the CPU.
        copies = {key: value.to(device if value.dim() else "cpu", copy=True) for key, value in values.items()}
        optimizer.state[parameters[name]].update(copies)


def _check_kept(
    name: str, values: dict[str, Tensor], parameter: Tensor | None, optimizer: torch.optim.Optimizer
) -> None:
    """ValueError unless ``values`` are what ``optimizer`` keeps of ``parameter``."""
    if parameter is None or values.keys() != _KEPT[type(optimizer)]:
        raise ValueError(f"the optimizer keeps nothing like {', '.join(values)} of a parameter {name!r}")
    for key, value in values.items():
        shape = torch.Size() if key == "step" else parameter.shape
        if value.shape != shape or not value.is_floating_point():
            raise ValueError(f"{key} of {name!r} must have shape {list(shape)}, got {list(value.shape)}")
