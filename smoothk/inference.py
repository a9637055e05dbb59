"""A model made ready for inference: batch norms folded, additions and ReLUs done by the low-rank convolution before it.

The model is read by `torch.fx`; parts of it that cannot be are left as they are, and what they hold is tried by itself.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

from .compress import deep_copy
from .layers import Conv, LowRankLinear, _LowRank, _LowRankConvNd

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)


class LowRankReLU(nn.Module):
    """``relu(layer(input) + residual)`` in one call; ``residual``, of the output's shape, and the ReLU are optional."""

    def __init__(self, layer: _LowRank, relu: bool) -> None:
        super().__init__()
        self.layer, self.relu = layer, relu

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.layer.compute(input, residual, self.relu)

    def extra_repr(self) -> str:
        return f"relu={self.relu}"


def optimize_for_inference(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for inference, with fewer passes over the activations.

    - Batch norm that follows a convolution, a linear or a low-rank layer is folded into it, in the low-rank case into
      ``u`` and the bias.
    - The addition of a shortcut and the ReLU that follow a low-rank layer are done by its kernel.

    Args:
        model: any module; left untouched. What `torch.fx` can trace becomes a `torch.fx.GraphModule`; of a model with
            control flow on values only the parts that can be traced are changed.

    Returns:
        A model in evaluation mode whose parameters need no gradient, with the outputs of ``model.eval()`` to rounding.
        `smoothk.save` and `smoothk.load` work on ``model``, not on this one.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return _optimize(deep_copy(model).eval().requires_grad_(False))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, _LowRank) or super().is_leaf_module(module, name)


def _optimize(model: nn.Module) -> nn.Module:
    if next(model.children(), None) is None:
        return model
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except Exception:  # whatever a forward that needs values does with a proxy
        for name, child in model.named_children():
            setattr(model, name, _optimize(child))
        return model
    traced = fx.GraphModule(tracer.root, graph, type(model).__name__)
    modules = dict(traced.named_modules())
    calls = Counter(id(modules[node.target]) for node in graph.nodes if node.op == "call_module")
    _fold_batch_norms(traced, modules, calls)
    _fuse_activations(traced, modules)
    traced.delete_all_unused_submodules()
    graph.lint()
    traced.recompile()
    return traced


def _fold_batch_norms(traced: fx.GraphModule, modules: dict[str, nn.Module], calls: Counter[int]) -> None:
    for node in list(traced.graph.nodes):
        norm, before = _module_of(node, modules), _only_input(node)
        layer = _module_of(before, modules)
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None or layer is None or len(before.users) > 1:
            continue
        folded = _folded(layer, norm) if calls[id(layer)] == calls[id(norm)] == 1 else None
        if folded is None:
            continue
        traced.set_submodule(before.target, folded)
        modules[before.target] = folded
        calls[id(folded)] = 1
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)


def _folded(layer: nn.Module, norm: _BatchNorm) -> nn.Module | None:
    """``layer`` followed by ``norm`` as one layer; None where that is not known how."""
    if isinstance(layer, _LowRank):
        return _folded_low_rank(layer, norm)
    if isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
        return fuse_linear_bn_eval(layer, norm)
    if isinstance(layer, Conv) and not isinstance(layer, _ConvTransposeNd):
        return fuse_conv_bn_eval(layer, norm)
    return None


def _folded_low_rank(layer: _LowRank, norm: _BatchNorm) -> _LowRank:
    """The affine map goes into u and the bias, in float32 at least."""
    with torch.no_grad():
        wide = torch.promote_types(layer.u.dtype, torch.float32)
        scale = (norm.running_var.to(wide) + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.to(wide)
        bias = -norm.running_mean.to(wide)
        if layer.bias is not None:
            bias = bias + layer.bias.to(wide)
        bias = bias * scale
        if norm.bias is not None:
            bias = bias + norm.bias.to(wide)
        u = layer.u.to(wide) * scale.reshape(-1, *(1,) * (layer.u.dim() - 1))
        layer.u = nn.Parameter(u.to(layer.u.dtype), requires_grad=False)
        layer.bias = nn.Parameter(bias.to(layer.u.dtype), requires_grad=False)
    return layer


def _fuse_activations(traced: fx.GraphModule, modules: dict[str, nn.Module]) -> None:
    """Give low-rank layers the addition and the ReLU that follow them."""
    for node in list(traced.graph.nodes):
        if not _is_relu(node, modules):
            continue
        before = _only_input(node)
        call, residual = before, None
        if before is not None and _is_addition(before) and len(before.users) == 1:
            call = next((a for a in before.args if _can_finish(a, modules, with_residual=True)), None)
            residual = None if call is None else before.args[before.args[0] is call]
        if not _can_finish(call, modules, residual is not None):
            continue
        name = f"{call.target}_relu" if residual is None else f"{call.target}_add_relu"
        traced.add_submodule(name, LowRankReLU(modules[call.target], relu=True))
        with traced.graph.inserting_before(node):  # both operands of the addition are there
            arguments = (*call.args, *call.kwargs.values()) if residual is None else (_only_input(call), residual)
            fused = traced.graph.call_module(name, arguments)
        node.replace_all_uses_with(fused)
        for dead in (node, *(() if residual is None else (before,)), call):
            traced.graph.erase_node(dead)


def _can_finish(node: Any, modules: dict[str, nn.Module], with_residual: bool) -> bool:
    """Whether ``node`` calls a low-rank layer whose result has no other use."""
    layer = _module_of(node, modules)
    kinds = _LowRankConvNd if with_residual else _LowRankConvNd | LowRankLinear
    return isinstance(layer, kinds) and len(node.users) == 1 and _only_input(node) is not None


def _module_of(node: Any, modules: dict[str, nn.Module]) -> nn.Module | None:
    """The module that ``node`` calls, if it calls one."""
    return modules.get(node.target) if isinstance(node, fx.Node) and node.op == "call_module" else None


def _only_input(node: fx.Node) -> fx.Node | None:
    """The one node whose value ``node`` takes as its only argument or first one."""
    inputs = node.all_input_nodes
    return inputs[0] if len(inputs) == 1 else None


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    if node.op == "call_function":
        return node.target in _RELUS
    return isinstance(_module_of(node, modules), nn.ReLU)


def _is_addition(node: fx.Node) -> bool:
    """Of two tensors, one time each."""
    named = node.target in _ADDITIONS if node.op == "call_function" else node.target in ("add", "add_")
    two = len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args) and not node.kwargs
    return node.op in ("call_function", "call_method") and named and two and node.args[0] is not node.args[1]
