"""Which layers of a model can be factorised, and why the others cannot."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .dense_layers import has_own_forward
from .layers import Conv, _LowRank
from .transposed import as_linear, transposed_linear_types

_DENSE_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class Candidates:
    """Layers by name, in the model's order; `layers` can be factorised, `refused` says why the others stay dense.

    For a linear layer with a transposed weight, `layers` holds a `torch.nn.Linear` on the same memory.
    """

    layers: dict[str, Conv | nn.Linear]
    refused: dict[str, str]


def find_candidates(model: nn.Module) -> Candidates:
    """Sort every convolution and linear layer of ``model``; a module that occurs several times has its first name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    layers: dict[str, Conv | nn.Linear] = {}
    refused: dict[str, str] = {}
    for name, module in model.named_modules():
        reason = _obstacle(module, uses)
        if reason is None:
            layers[name] = as_linear(module) if isinstance(module, transposed_linear_types()) else module
        elif reason:
            refused[name] = reason
    return Candidates(layers, refused)


def _obstacle(module: nn.Module, uses: Counter[int]) -> str | None:
    """None for a layer that can be factorised, why not for one that cannot, "" for a module that is no such layer."""
    if isinstance(module, _ConvTransposeNd):
        return "transposed convolution"
    if isinstance(module, _LowRank):
        return "low-rank already"
    if type(module).__module__.startswith("torch.ao.nn") and hasattr(module, "weight"):
        return "quantised"
    kinds: tuple[type[nn.Module], ...] = (*_DENSE_TYPES, *transposed_linear_types())
    kind = next((kind for kind in kinds if isinstance(module, kind)), None)
    if kind is None:
        return ""
    if parametrize.is_parametrized(module):
        return "parametrised"
    if isinstance(module, LazyModuleMixin):
        return "not initialised (lazy)"
    if vars(module).keys() & {"forward", "_conv_forward"}:
        return "its forward is patched"
    if has_own_forward(module, kind):
        return f"{type(module).__name__} has a forward of its own"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed by a hook"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks, which a new layer would lose"
    if uses[id(weight)] > 1:
        return "its weight is tied to another module's"
    bias = module._parameters.get("bias")
    if bias is not None and uses[id(bias)] > 1:
        return "its bias is tied to another module's"
    if not weight.is_floating_point():
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    if isinstance(module, _ConvNd) and module.groups > 1 and module.groups == module.in_channels:
        return "depthwise"
    if weight.numel() == 0:
        return "its weight is empty"
    return None


def check_trained(model: nn.Module) -> None:
    """Raise ValueError that names the first parameter or batch-norm statistic with NaN or Inf, as a run that diverged
    leaves them; other buffers may hold Inf (attention masks do)."""
    named: list[tuple[str, Tensor]] = list(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            named += [(f"{name}.{key}" if name else key, buffer) for key, buffer in module.named_buffers(recurse=False)]
    for name, tensor in named:
        if is_lazy(tensor):
            continue
        if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor.detach()).all():
            raise ValueError(f"{name} of the model must be finite, got NaN or Inf")


def check_finite(layers: dict[str, Conv | nn.Linear]) -> None:
    """Raise ValueError that names the first layer whose weight holds NaN or Inf."""
    for name, layer in layers.items():
        if not layer.weight.is_meta and not torch.isfinite(layer.weight.detach()).all():
            raise ValueError(f"weight of layer {name!r} must be finite, got NaN or Inf")
