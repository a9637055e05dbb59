"""A model made ready for inference: batch norms folded, additions and ReLUs done by the low-rank convolution before it.

The model is read by `torch.fx`; parts of it that cannot be are left as they are, and what they hold is tried by itself.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

from .copies import deep_copy
from .layers import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLinear, _LowRank
from .low_rank_ops import finish
from .tracing import (
    CONVS,
    NORMS,
    RELUS,
    called,
    has_one_argument,
    is_addition,
    is_altered,
    module_of,
    only_input,
    trace,
    writes,
)

_MARK = "_made_by_optimize_for_inference"
_LOW_RANK_CONVS = (LowRankConv1d, LowRankConv2d, LowRankConv3d)


class LowRankReLU(nn.Module):
    """``relu(layer(input) + residual)`` in one call; ``residual``, of the output's shape, and the ReLU are optional."""

    def __init__(self, layer: _LowRank, relu: bool) -> None:
        super().__init__()
        self.layer, self.relu = layer, relu

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        # torch.fx cannot tell a number from a tensor; `smoothk.decompress` puts a layer in that takes the input only.
        if not isinstance(self.layer, _LowRank) or (residual is not None and not isinstance(residual, Tensor)):
            return finish(self.layer(input), residual, self.relu)
        return self.layer(input, residual, self.relu)

    def extra_repr(self) -> str:
        return f"relu={self.relu}"


def optimize_for_inference(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for inference, with fewer passes over the activations.

    - Batch norm that follows a convolution, a linear or a low-rank layer is folded into it, in the low-rank case into
      ``u`` and the bias.
    - The addition of a shortcut and the ReLU that follow a low-rank layer are done by its kernel.

    Args:
        model: any module; left untouched. What `torch.fx` can trace becomes a `torch.fx.GraphModule`; of a model with
            control flow on values, or with an argument that may be None, only the parts that can be traced are
            changed, and the rest can do nothing with these but call them. A linear layer followed by batch norm gets
            ``[N, features]``.

    Returns:
        A model in evaluation mode whose parameters need no gradient, with the outputs of ``model.eval()`` to rounding.
        `smoothk.save` and `smoothk.load` work on ``model``, not on this one.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return _optimize(deep_copy(model).eval().requires_grad_(False))


def is_optimized(model: nn.Module) -> bool:
    """Whether `optimize_for_inference` made ``model`` or a part of it."""
    parts = [module for module in model.modules() if isinstance(module, fx.GraphModule)]
    return any(_MARK in part.meta or hasattr(part, _MARK) for part in parts)


def _optimize(model: nn.Module) -> nn.Module:
    if next(model.children(), None) is None:
        return model
    graph = trace(model)
    if graph is None:
        for name, child in model.named_children():
            setattr(model, name, _optimize(child))
        return model
    traced = fx.GraphModule(model, graph, type(model).__name__)
    traced.meta[_MARK] = True  # goes into copies,
    setattr(traced, _MARK, True)  # and this through pickle
    graph = traced.graph
    modules = dict(traced.named_modules())
    calls = Counter(id(modules[node.target]) for node in graph.nodes if node.op == "call_module")
    _fold_batch_norms(traced, modules, calls)
    _fuse_activations(traced, modules)
    traced.delete_all_unused_submodules()
    graph.lint()
    traced.recompile()
    return traced


def _fold_batch_norms(traced: fx.GraphModule, modules: dict[str, nn.Module], calls: Counter[int]) -> None:
    read = {node.target.rpartition(".")[0] for node in traced.graph.nodes if node.op == "get_attr"}
    for node in list(traced.graph.nodes):
        norm, before = module_of(node, modules), only_input(node)
        layer = module_of(before, modules)
        if before is None or layer is None or len(before.users) > 1:
            continue
        if not isinstance(norm, _BatchNorm) or type(norm) not in NORMS or norm.running_mean is None:
            continue
        if before.target in read or is_altered(layer) or is_altered(norm) or not has_one_argument(before):
            continue
        folded = _folded(layer, norm) if calls[id(layer)] == calls[id(norm)] == 1 else None
        if folded is None:
            continue
        name = called(before)
        traced.set_submodule(name, folded)
        modules[name] = folded
        calls[id(folded)] = 1
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)


def _folded(layer: nn.Module, norm: _BatchNorm) -> nn.Module | None:
    """A copy of ``layer`` followed by ``norm`` as one layer; None where that is not known how."""
    kind, linear = type(layer), type(norm) is nn.BatchNorm1d and getattr(layer, "out_features", 0) == norm.num_features
    conv = getattr(layer, "out_channels", 0) == norm.num_features  # not where images without a batch are one
    if isinstance(layer, _LowRank) and ((kind in _LOW_RANK_CONVS and conv) or (kind is LowRankLinear and linear)):
        return _folded_low_rank(copy.deepcopy(layer), norm)  # a part that is not traced may use it, too
    if type(layer) is nn.Linear and linear:
        return fuse_linear_bn_eval(layer, norm)
    return fuse_conv_bn_eval(layer, norm) if isinstance(layer, CONVS) and kind in CONVS and conv else None


def _folded_low_rank(layer: _LowRank, norm: _BatchNorm) -> _LowRank:
    """The affine map goes into u and the bias, in float32 at least."""
    assert norm.running_mean is not None and norm.running_var is not None
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
        before = only_input(node)
        if before is None:
            continue
        call: fx.Node | None = before
        residual: fx.node.Argument = None
        if is_addition(before) and len(before.users) == 1:
            # Written in place is at most the layer's result, which nothing else sees.
            summands = before.args[: 1 if writes(before, modules) else 2]
            call = next((a for a in summands if _can_finish(a, node, modules, before)), None)
            residual = None if call is None else before.args[before.args[0] is call]
        if not _can_finish(call, node, modules, None if residual is None else before):
            continue
        layer = modules[called(call)]
        assert isinstance(layer, _LowRank)
        name = f"{call.target}_relu" if residual is None else f"{call.target}_add_relu"
        while name in modules:
            name += "_"
        modules[name] = LowRankReLU(layer, relu=True)
        traced.add_submodule(name, modules[name])
        with traced.graph.inserting_before(node):  # both operands of the addition are there
            arguments = (*call.args, *call.kwargs.values()) if residual is None else (only_input(call), residual)
            fused = traced.graph.call_module(name, arguments)
        node.replace_all_uses_with(fused)
        for dead in (node, *(() if residual is None else (before,)), call):
            traced.graph.erase_node(dead)


def _can_finish(
    call: Any, relu: fx.Node, modules: dict[str, nn.Module], addition: fx.Node | None
) -> TypeGuard[fx.Node]:
    """Whether ``call`` is that of a low-rank layer, its result has no other use, and it could as well be made where
    ``relu`` is."""
    layer = module_of(call, modules)
    kinds = _LOW_RANK_CONVS if addition is not None else (*_LOW_RANK_CONVS, LowRankLinear)
    if layer is None or type(layer) not in kinds or is_altered(layer):
        return False
    if len(call.users) > 1 or not has_one_argument(call):
        return False
    between = call.next
    while between is not relu:
        if between is not addition and writes(between, modules):
            return False
        between = between.next
    return True


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    if node.op == "call_function":
        return node.target in RELUS
    module = module_of(node, modules)
    return module is not None and type(module) is nn.ReLU and not is_altered(module)
