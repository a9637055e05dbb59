"""Mean and variance of every channel that a layer gets, from the batch norms before it; no input is looked at.

What batch norm gives has, by its running statistics, the mean β and the deviation γ in each channel. As independent
normal variables these go through activations, additions and concatenations, up to the next layers: Nagel, van Baalen,
Blankevoort & Welling, "Data-free quantization through weight equalization and bias correction" (arXiv 1906.04721),
section 4.2.1, where it is one ReLU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .modes import evaluating
from .tracing import CONVS, called, has_hooks, has_one_argument, is_addition, trace, writes

_SAMPLES = 1000  # quantiles of the normal distribution that an activation is averaged over
_SAME = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus),
)
_NAMES = ("relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "hardswish", "hardsigmoid",
          "hardtanh", "sigmoid", "tanh", "softplus")  # fmt: skip
_FUNCTIONS = {
    getattr(place, name)
    for place in (torch, F)
    for kind in _NAMES
    for name in (kind, f"{kind}_")
    if hasattr(place, name)
}
_METHODS = ("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_")
_POOLS = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_POOL_FUNCTIONS = (
    *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
)
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


class Channels(NamedTuple):
    """Mean and variance of each channel, ``[C]`` float64, and whether there may be axes behind the channels'."""

    mean: Tensor
    variance: Tensor
    spatial: bool


@dataclass(frozen=True)
class LayerInput:
    """What a convolution or linear layer gets, and who takes what it gives.

    Attributes:
        mean: of every input channel, ``[C_in]`` float64.
        norm: the batch norm that takes the layer's output, where nothing else does; else None.
    """

    mean: Tensor
    norm: str | None


def layer_inputs(model: nn.Module) -> dict[str, LayerInput]:
    """Of every convolution and linear layer of ``model`` that is called once, and whose input is known.

    Args:
        model: not changed. Of a model that `torch.fx` cannot trace, the parts that it can are looked at.
    """
    with evaluating(model), torch.no_grad():
        return dict(_read(model, ""))


def _read(model: nn.Module, prefix: str) -> Iterator[tuple[str, LayerInput]]:
    if next(model.children(), None) is None:
        return
    traced = trace(model)
    if traced is None:
        for part, child in model.named_children():
            yield from _read(child, f"{prefix}{part}.")
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [_name_of(modules, node) for node in traced.graph.nodes]
    calls = Counter(id(modules[name]) for name in names if name)
    known: dict[fx.Node, Channels | None] = {}
    for node, name in zip(traced.graph.nodes, names, strict=True):
        inputs = [known.get(before) for before in node.all_input_nodes]
        layer = modules[name] if name else None
        known[node] = _given(node, layer, inputs)
        if inputs and writes(node, modules):
            known[node.all_input_nodes[0]] = known[node]
        if layer is None or calls[id(layer)] > 1 or not has_one_argument(node):
            continue
        if inputs[0] is not None and _takes(layer, inputs[0]):
            norm = _norm_behind(node, modules, calls)
            yield f"{prefix}{name}", LayerInput(inputs[0].mean, None if norm is None else prefix + norm)


def _takes(layer: nn.Module, x: Channels) -> bool:
    """Whether ``layer`` is a convolution or linear layer that mixes the channels of ``x``."""
    if type(layer) is nn.Linear:
        return not x.spatial and len(x.mean) == layer.in_features
    return type(layer) in CONVS and len(x.mean) == layer.in_channels


def _name_of(modules: dict[str, nn.Module], node: fx.Node) -> str | None:
    """The module that ``node`` calls; also a batch norm of a class of its own, in which torch.fx sees the function."""
    if node.target is F.batch_norm and len(node.args) > 1:
        statistics = node.args[1]
        if isinstance(statistics, fx.Node) and statistics.op == "get_attr":
            return str(statistics.target).removesuffix(".running_mean")
    return called(node) if node.op == "call_module" else None


def _norm_behind(node: fx.Node, modules: dict[str, nn.Module], calls: Counter[int]) -> str | None:
    users = [user for user in node.users if user.target not in (getattr, "size", "dim")]  # of the values
    if len(users) != 1:
        return None
    name = _name_of(modules, users[0])
    norm = None if name is None else modules[name]
    alone = norm is not None and _has_statistics(norm) and not has_hooks(norm) and calls[id(norm)] == 1
    return name if alone else None


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def _given(node: fx.Node, module: nn.Module | None, inputs: list[Channels | None]) -> Channels | None:
    """What ``node`` gives, None where that is not known how."""
    if module is not None and has_hooks(module):
        return None
    if module is not None and _has_statistics(module):
        return _normalised(module)
    if node.target in ("view", "reshape") and len(node.args) == 3 and node.args[2] == -1:
        return None if inputs[0] is None else inputs[0]._replace(spatial=False)  # of x, x.size(0)
    if not inputs or any(x is None for x in inputs):
        return None
    x, *others = (x for x in inputs if x is not None)
    if others:
        return _joined(node, [x, *others])
    target, options = node.target, (node.args[1:], node.kwargs)
    if module is not None:
        if type(module) in _ACTIVATIONS:
            return _activated(module, x)
        if type(module) is nn.Flatten:
            return x._replace(spatial=False) if (module.start_dim, module.end_dim) == (1, -1) else None
        return x if type(module) in (*_SAME, *_POOLS) else None
    if target in _POOL_FUNCTIONS:
        return x
    if target in _FUNCTIONS or (node.op == "call_method" and target in _METHODS):
        call = getattr(Tensor, target) if isinstance(target, str) else target
        return _activated(lambda samples: call(samples, *options[0], **options[1]), x)
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if name == "mean":
        return _averaged(x, *options)
    flat = name == "flatten" and options in (((1,), {}), ((), {"start_dim": 1}))
    return x._replace(spatial=False) if flat else None


def _normalised(norm: nn.Module) -> Channels:
    """By batch norm with its running statistics."""
    assert isinstance(norm, _BatchNorm) and norm.running_var is not None
    variance = norm.running_var.double()
    variance = variance / (variance + norm.eps)
    mean = torch.zeros_like(variance) if norm.bias is None else norm.bias.double()
    if norm.weight is not None:
        variance = variance * norm.weight.double().square()
    return Channels(mean, variance, spatial=type(norm) is not nn.BatchNorm1d)


def _activated(function: Callable[[Tensor], Tensor], x: Channels) -> Channels:
    """By a function of one entry: its mean and variance over quantiles of the normal distribution."""
    shares = (torch.arange(_SAMPLES, dtype=torch.float64, device=x.mean.device) + 0.5) / _SAMPLES
    samples = x.mean + x.variance.sqrt() * torch.special.ndtri(shares)[:, None]
    values = function(samples)
    return x._replace(mean=values.mean(0), variance=values.var(0, correction=0))


def _joined(node: fx.Node, inputs: list[Channels]) -> Channels | None:
    """By an addition, or side by side."""
    if is_addition(node):
        (a, b) = inputs
        if len(a.mean) != len(b.mean) or a.spatial != b.spatial:
            return None
        return Channels(a.mean + b.mean, a.variance + b.variance, a.spatial)
    options = (node.args[1:], node.kwargs)
    if node.target not in _CONCATENATIONS or options not in (((1,), {}), ((), {"dim": 1})):
        return None
    order = dict(zip(node.all_input_nodes, inputs, strict=True))  # a tensor may be there twice
    parts = [order[part] for part in node.args[0]]  # type: ignore[union-attr, index]
    return Channels(torch.cat([p.mean for p in parts]), torch.cat([p.variance for p in parts]), parts[0].spatial)


def _averaged(x: Channels, args: tuple[Any, ...], options: dict[str, Any]) -> Channels | None:
    """By ``mean(dim, keepdim)`` over the axes behind the channels'."""
    dim, keepdim = (*args, options.get("dim"), options.get("keepdim", False))[:2]
    dims = (dim,) if isinstance(dim, int) else tuple(dim or ())
    if not x.spatial or not dims or not set(dims) <= {2, 3, 4, -1, -2}:
        return None
    return x._replace(spatial=bool(keepdim))
