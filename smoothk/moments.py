"""Mean and variance of every channel that a layer gets, from the batch norms before it; no input is looked at.

What batch norm gives has, by its running statistics, the mean β and the deviation γ in each channel. As normal
variables these go through activations and concatenations, up to the next layers: Nagel, van Baalen, Blankevoort &
Welling, "Data-free quantization through weight equalization and bias correction" (arXiv 1906.04721), section 4.2.1,
where it is one ReLU. Average pooling leaves the mean alone and additions add means; of the variance no more is known,
for pixels and branches are not independent, and so nothing of an activation of these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _BatchNorm

from .copies import deep_copy
from .tracing import CONVS, called, has_one_argument, is_addition, is_altered, out_arguments, trace, writes

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
_STATISTICS = ("running_mean", "running_var", "weight", "bias")


class Channels(NamedTuple):
    """Mean and variance of each channel, ``[C]`` float64 on the CPU, and the number of axes behind the channels'; None
    where variance or axes are not known."""

    mean: Tensor
    variance: Tensor | None
    axes: int | None


@dataclass(frozen=True)
class LayerInput:
    """What a convolution or linear layer gets, and who takes what it gives.

    Attributes:
        mean: of every input channel, ``[C_in]`` float64 on the CPU.
        norm: the batch norm that takes the layer's output, where nothing else does; else None.
    """

    mean: Tensor
    norm: str | None


def layer_inputs(model: nn.Module) -> dict[str, LayerInput]:
    """Of every convolution and linear layer of ``model`` that is called once, and whose input is known.

    Args:
        model: not changed. Of a model that `torch.fx` cannot trace, the parts that it can are looked at, as if all that
            the model did with them were to call them, a `torch.nn.Sequential` as a whole. Modules in it that have
            hooks or another forward than their class are not looked into.
    """
    copy = deep_copy(model).eval()  # a forward may write to buffers, and keep what it computes
    modules = dict(copy.named_modules(remove_duplicate=False))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        parts = [_Part(modules, prefix, graph) for prefix, graph in _graphs(copy, "")]
        calls = Counter(id(modules[name]) for part in parts for name in part.names.values() if name is not None)
        return {name: seen for part in parts for name, seen in part.layers(calls)}


def _graphs(model: nn.Module, prefix: str) -> Iterator[tuple[str, fx.Graph]]:
    if next(model.children(), None) is None:
        return
    graph = trace(model, is_altered)
    if graph is not None:
        yield prefix, graph
        return
    for name, child in model.named_children():
        yield from _graphs(child, f"{prefix}{name}.")


class _Part:
    """A part of a model whose graph is known.

    Args:
        modules: of the model, by name.
        prefix: of the part's names.
    """

    def __init__(self, modules: dict[str, nn.Module], prefix: str, graph: fx.Graph) -> None:
        self.modules, self.prefix, self.graph = modules, prefix, graph
        self.names = {node: self._name(node) for node in graph.nodes}
        self.own = {name.removeprefix(prefix): module for name, module in modules.items() if name.startswith(prefix)}

    def layers(self, calls: Counter[int]) -> Iterator[tuple[str, LayerInput]]:
        """Names and inputs of its layers; ``calls`` counts those of modules in all parts."""
        known: dict[fx.Node, Channels | None] = {}
        memory: dict[fx.Node, fx.Node] = {}  # the node that made what a node gives
        for node, name in self.names.items():
            module, inputs = self._module(node), [known.get(before) for before in node.all_input_nodes]
            given = known[node] = self._given(node, module, inputs)
            memory[node] = memory[node.all_input_nodes[0]] if inputs and self._is_view(node, module, given) else node
            if inputs and self._writes(node):
                written = {memory[target] for target in out_arguments(node) or node.all_input_nodes[:1]}
                for other in [other for other, made in memory.items() if made in written]:
                    known[other] = given if _alike(known[other], given) else None
            if name is None or module is None or calls[id(module)] > 1 or not has_one_argument(node):
                continue
            if inputs[0] is not None and _takes(module, inputs[0]):
                yield name, LayerInput(inputs[0].mean, self._norm_behind(node, calls))

    def _name(self, node: fx.Node) -> str | None:
        """The module that ``node`` calls."""
        if node.op == "call_module":
            return self.prefix + called(node)
        return self._norm_of(node) if node.target is F.batch_norm else None

    def _norm_of(self, node: fx.Node) -> str | None:
        """The batch norm of a class of its own, as timm has them, of which torch.fx sees the function."""
        given = dict(zip(("input", *_STATISTICS, "training"), node.args, strict=False)) | node.kwargs
        names = {key: getattr(given.get(key), "target", None) for key in _STATISTICS}
        owner = str(names["running_mean"]).rpartition(".")[0]
        name = (self.prefix + owner).rstrip(".")
        norm = self.modules.get(name)
        if norm is None or not _has_statistics(norm) or given.get("training"):
            return None
        expected = {
            key: f"{owner}.{key}".lstrip(".") if getattr(norm, key) is not None else None for key in _STATISTICS
        }
        return name if names == expected else None

    def _module(self, node: fx.Node) -> nn.Module | None:
        name = self.names[node]
        return None if name is None else self.modules[name]

    def _norm_behind(self, node: fx.Node, calls: Counter[int]) -> str | None:
        users = [user for user in node.users if not _asks_for_sizes(user)]
        norm = self._module(users[0]) if len(users) == 1 else None
        if norm is None or not _has_statistics(norm) or is_altered(norm) or calls[id(norm)] > 1:
            return None
        return self.names[users[0]]

    def _given(self, node: fx.Node, module: nn.Module | None, inputs: list[Channels | None]) -> Channels | None:
        """What ``node`` gives, None where that is not known how."""
        if module is not None and is_altered(module):
            return None
        if module is not None and _has_statistics(module):
            return _normalised(module, self._module(node.all_input_nodes[0]))
        if node.target in ("view", "reshape") and len(node.args) == 3 and node.args[2] == -1:
            return None if inputs[0] is None else inputs[0]._replace(axes=0)  # of x, x.size(0)
        if not inputs or any(x is None for x in inputs):
            return None
        x, *others = (x for x in inputs if x is not None)
        if others:
            return _joined(node, [x, *others])
        return _computed(node, x) if module is None else _passed(module, x)

    def _is_view(self, node: fx.Node, module: nn.Module | None, given: Channels | None) -> bool:
        """Whether what ``node`` gives may lie in the memory of its first input."""
        if module is not None:
            return type(module) in (*_SAME, nn.Flatten, nn.Unflatten) or is_altered(module) or self._writes(node)
        return given is None or self._writes(node) or node.target in ("view", "reshape", "flatten", torch.flatten)

    def _writes(self, node: fx.Node) -> bool:
        """`writes`, which takes any True for "in place", but for what is known to be none."""
        named = node.target in (*_POOL_FUNCTIONS, "mean", torch.mean)
        return not named and self.names[node] in (None, self.prefix + called(node)) and writes(node, self.own)


def _asks_for_sizes(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim")
    return node.target is getattr and node.args[1] in ("shape", "ndim")


def _takes(layer: nn.Module, x: Channels) -> bool:
    """Whether ``layer`` is a convolution or linear layer that mixes the channels of ``x``."""
    if type(layer) is nn.Linear:
        return x.axes == 0 and len(x.mean) == layer.in_features
    if type(layer) not in CONVS:
        return False
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return x.axes in (None, len(layer.kernel_size)) and len(x.mean) == layer.in_channels


def _alike(x: Channels | None, y: Channels | None) -> bool:
    return x is not None and y is not None and x.axes == y.axes and len(x.mean) == len(y.mean)


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None and not module.running_mean.is_meta


def _normalised(norm: nn.Module, before: nn.Module | None) -> Channels:
    """By batch norm with its running statistics, of what the layer ``before`` gives."""
    assert isinstance(norm, _BatchNorm) and norm.running_var is not None
    variance = norm.running_var.cpu().double()
    variance = variance / (variance + norm.eps)
    mean = torch.zeros_like(variance) if norm.bias is None else norm.bias.cpu().double()
    if norm.weight is not None:
        variance = variance * norm.weight.cpu().double().square()
    axes = next((axes for kind, axes in ((nn.BatchNorm2d, 2), (nn.BatchNorm3d, 3)) if isinstance(norm, kind)), None)
    if type(before) is nn.Linear and before.out_features == len(mean):
        axes = 0
    elif isinstance(before, CONVS):
        axes = len(before.kernel_size)
    return Channels(mean, variance, axes)


def _passed(module: nn.Module, x: Channels) -> Channels | None:
    """By a module of torch that has one input."""
    if type(module) in _ACTIVATIONS:
        return _activated(module, x)
    if type(module) is nn.Flatten:
        return x._replace(axes=0) if (module.start_dim, module.end_dim) == (1, -1) else None
    if type(module) in _POOLS and getattr(module, "divisor_override", None) is None:
        return x._replace(variance=None)
    return x if type(module) in _SAME else None


def _computed(node: fx.Node, x: Channels) -> Channels | None:
    """By a function or method of one tensor."""
    target: Any = node.target
    args: tuple[Any, ...] = node.args[1:]
    options: dict[str, Any] = node.kwargs
    if target in _POOL_FUNCTIONS:
        divided = len(args) > 5 or options.get("divisor_override") is not None
        return None if divided else x._replace(variance=None)
    if target in _FUNCTIONS or (node.op == "call_method" and target in _METHODS):
        call = getattr(Tensor, target) if isinstance(target, str) else target
        return _activated(lambda z: call(*map_arg(node.args, lambda _: z), **map_arg(node.kwargs, lambda _: z)), x)
    if target in ("mean", torch.mean):
        return _averaged(x, *args, **options)
    flat = target in ("flatten", torch.flatten) and (args, options) in (((1,), {}), ((), {"start_dim": 1}))
    return x._replace(axes=0) if flat else None


def _activated(function: Callable[[Tensor], Tensor], x: Channels) -> Channels | None:
    """By a function of one entry: its mean and variance over quantiles of the normal distribution."""
    if x.variance is None:
        return None
    shares = (torch.arange(_SAMPLES, dtype=torch.float64, device="cpu") + 0.5) / _SAMPLES
    values = function(x.mean + x.variance.sqrt() * torch.special.ndtri(shares)[:, None])
    return x._replace(mean=values.mean(0), variance=values.var(0, correction=0))


def _joined(node: fx.Node, inputs: list[Channels]) -> Channels | None:
    """By an addition, or side by side."""
    if is_addition(node):
        a, b = inputs
        return Channels(a.mean + b.mean, None, a.axes) if _alike(a, b) else None
    options = (node.args[1:], node.kwargs)
    if node.target not in _CONCATENATIONS or options not in (((1,), {}), ((), {"dim": 1})):
        return None
    order = dict(zip(node.all_input_nodes, inputs, strict=True))  # a tensor may be there twice
    parts = [order[part] for part in node.args[0]]  # type: ignore[union-attr, index]
    if any(part.axes != parts[0].axes for part in parts):
        return None
    variances = [part.variance for part in parts if part.variance is not None]
    variance = torch.cat(variances) if len(variances) == len(parts) else None
    return Channels(torch.cat([part.mean for part in parts]), variance, parts[0].axes)


def _averaged(x: Channels, dim: Any = None, keepdim: bool = False, **options: Any) -> Channels | None:
    """By ``mean`` over axes behind the channels'."""
    dims = {dim} if isinstance(dim, int) else set(dim or ())
    x = x._replace(variance=None)
    if x.axes is None:
        return x._replace(axes=0) if dims in ({2}, {-1}) and not keepdim else None
    dims = {d if d >= 0 else d + 2 + x.axes for d in dims}
    if not dims or not dims <= set(range(2, 2 + x.axes)):
        return None
    return x if keepdim else x._replace(axes=x.axes - len(dims))
