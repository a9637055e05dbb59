"""A model made ready for inference: batch norms folded, additions and ReLUs done by the low-rank convolution before it.

The model is read by `torch.fx`; parts of it that cannot be are left as they are, and what they hold is tried by itself.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

from .compress import deep_copy
from .layers import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLinear, _LowRank
from .low_rank_ops import finish

# Exact types: a subclass, which a parametrization makes too, may compute something else.
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LOW_RANK_CONVS = (LowRankConv1d, LowRankConv2d, LowRankConv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)
_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")


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


class _Proxy(fx.Proxy):
    """Keeps ``x += y`` what it is: torch.fx makes ``x = x + y`` of it, and another name of x would miss the sum."""


def _in_place(name: str) -> Callable[[_Proxy, Any], fx.Proxy]:
    return lambda x, y: x.tracer.create_proxy("call_function", getattr(operator, name), (x, y), {})


for _name in _IN_PLACE:
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, _LowRank) or super().is_leaf_module(module, name)


def _optimize(model: nn.Module) -> nn.Module:
    if next(model.children(), None) is None:
        return model
    tracer = _Tracer()
    try:
        if _has_hooks(model) or "forward" in vars(model):
            raise TypeError("torch.fx reads the forward of the class, and no hooks of the module that it traces")
        if any(p.default is None for p in inspect.signature(model.forward).parameters.values()):
            raise TypeError("torch.fx takes an argument for a tensor where the default is None")
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
    read = {node.target.rpartition(".")[0] for node in traced.graph.nodes if node.op == "get_attr"}
    for node in list(traced.graph.nodes):
        norm, before = _module_of(node, modules), _only_input(node)
        layer = _module_of(before, modules)
        if before is None or layer is None or len(before.users) > 1:
            continue
        if not isinstance(norm, _BatchNorm) or type(norm) not in _NORMS or norm.running_mean is None:
            continue
        if before.target in read or _has_hooks(layer) or _has_hooks(norm) or not _has_one_argument(before):
            continue
        folded = _folded(layer, norm) if calls[id(layer)] == calls[id(norm)] == 1 else None
        if folded is None:
            continue
        name = _called(before)
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
    return fuse_conv_bn_eval(layer, norm) if isinstance(layer, _CONVS) and kind in _CONVS and conv else None


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
        before = _only_input(node)
        if before is None:
            continue
        call: fx.Node | None = before
        residual: fx.node.Argument = None
        if _is_addition(before) and len(before.users) == 1:
            # Written in place is at most the layer's result, which nothing else sees.
            summands = before.args[: 1 if _writes(before, modules) else 2]
            call = next((a for a in summands if _can_finish(a, node, modules, before)), None)
            residual = None if call is None else before.args[before.args[0] is call]
        if not _can_finish(call, node, modules, None if residual is None else before):
            continue
        layer = modules[_called(call)]
        assert isinstance(layer, _LowRank)
        name = f"{call.target}_relu" if residual is None else f"{call.target}_add_relu"
        while name in modules:
            name += "_"
        modules[name] = LowRankReLU(layer, relu=True)
        traced.add_submodule(name, modules[name])
        with traced.graph.inserting_before(node):  # both operands of the addition are there
            arguments = (*call.args, *call.kwargs.values()) if residual is None else (_only_input(call), residual)
            fused = traced.graph.call_module(name, arguments)
        node.replace_all_uses_with(fused)
        for dead in (node, *(() if residual is None else (before,)), call):
            traced.graph.erase_node(dead)


def _can_finish(
    call: Any, relu: fx.Node, modules: dict[str, nn.Module], addition: fx.Node | None
) -> TypeGuard[fx.Node]:
    """Whether ``call`` is that of a low-rank layer, its result has no other use, and it could as well be made where
    ``relu`` is."""
    layer = _module_of(call, modules)
    kinds = _LOW_RANK_CONVS if addition is not None else (*_LOW_RANK_CONVS, LowRankLinear)
    if layer is None or type(layer) not in kinds or _has_hooks(layer):
        return False
    if len(call.users) > 1 or not _has_one_argument(call):
        return False
    between = call.next
    while between is not relu:
        if between is not addition and _writes(between, modules):
            return False
        between = between.next
    return True


def _has_one_argument(call: fx.Node) -> bool:
    """Whether the input is all that is passed: a low-rank layer also takes a residual and a ReLU."""
    return len(call.args) + len(call.kwargs) == len(call.all_input_nodes) == 1


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _writes(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether ``node`` may change a tensor that it gets."""
    if node.op == "call_module":
        return any(getattr(module, "inplace", False) for module in modules[_called(node)].modules())
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    flags = (*node.args, node.kwargs.get("inplace"))  # F.relu(x, True)
    named = name in (*_IN_PLACE, "setitem") or (name.endswith("_") and not name.endswith("__"))
    return named or "out" in node.kwargs or any(flag is True for flag in flags)


def _called(node: fx.Node) -> str:
    """The name of the module that ``node`` calls."""
    return str(node.target)


def _module_of(node: Any, modules: dict[str, nn.Module]) -> nn.Module | None:
    """The module that ``node`` calls, if it calls one."""
    return modules.get(_called(node)) if isinstance(node, fx.Node) and node.op == "call_module" else None


def _only_input(node: fx.Node) -> fx.Node | None:
    """The one node whose value ``node`` takes as its only argument or first one."""
    inputs = node.all_input_nodes
    return inputs[0] if len(inputs) == 1 else None


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    if node.op == "call_function":
        return node.target in _RELUS
    module = _module_of(node, modules)
    return module is not None and type(module) is nn.ReLU and not _has_hooks(module)


def _is_addition(node: fx.Node) -> bool:
    """Of two tensors, one time each."""
    named = node.target in _ADDITIONS if node.op == "call_function" else node.target in ("add", "add_")
    two = len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args) and not node.kwargs
    return node.op in ("call_function", "call_method") and named and two and node.args[0] is not node.args[1]
