"""The graph of a model's forward, read by `torch.fx` without running it."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import map_arg

from .layers import _LowRank

# Exact types: a subclass, which a parametrization makes too, may compute something else.
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
ADDITIONS = (operator.add, torch.add)
RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)
AUGMENTED = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")


def augmented(x: Any, y: Any, operation: str) -> Any:
    """``x += y`` and the like as a call: torch.fx prints `operator.iadd` as a statement, which would change the size
    that two names stand for under both."""
    return getattr(operator, operation)(x, y)


class _Proxy(fx.Proxy):
    """Keeps ``x += y`` what it is: torch.fx makes ``x = x + y`` of it, and another name of x would miss the sum."""


def _record(operation: str) -> Callable[[_Proxy, Any], fx.Proxy]:
    return lambda x, y: x.tracer.create_proxy("call_function", augmented, (x, y, operation), {})


for _operation in AUGMENTED:
    setattr(_Proxy, f"__{_operation}__", _record(_operation))
del _operation


class _Tracer(fx.Tracer):
    def __init__(self, are_leaves: Callable[[nn.Module], bool] | None = None) -> None:
        super().__init__()
        self.are_leaves = are_leaves

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        more = self.are_leaves is not None and self.are_leaves(module)
        return more or isinstance(module, _LowRank) or super().is_leaf_module(module, name)


def trace(model: nn.Module, are_leaves: Callable[[nn.Module], bool] | None = None) -> fx.Graph | None:
    """The graph of ``model`` in its present mode, None where `torch.fx` cannot read it: control flow on values, an
    argument that may be None, hooks.

    What the forward does beside, to attributes and buffers, it does: trace a copy.

    Args:
        are_leaves: modules that are not looked into, beside torch's own and the low-rank layers.
    """
    try:
        if is_altered(model):
            raise TypeError("torch.fx reads the forward of the class, and no hooks of the module that it traces")
        if any(p.default is None for p in inspect.signature(model.forward).parameters.values()):
            raise TypeError("torch.fx takes an argument for a tensor where the default is None")
        return _Tracer(are_leaves).trace(model)
    except Exception:  # whatever a forward that needs values does with a proxy
        return None


def is_altered(module: nn.Module) -> bool:
    """Whether a call of ``module`` does something else than the forward of its class: hooks, a patched forward."""
    compiled = "_orig_mod" in module._modules  # has a forward of its own, in which torch.fx does not get far
    patched = bool(vars(module).keys() & {"forward", "_conv_forward"}) and not compiled
    return bool(module._forward_hooks or module._forward_pre_hooks) or patched


def is_addition(node: fx.Node) -> bool:
    """Of two tensors, one time each."""
    args = node.args
    if node.target is augmented:
        named, args = args[2] == "iadd", args[:2]
    elif node.op == "call_function":
        named = node.target in ADDITIONS
    else:
        named = node.op == "call_method" and node.target in ("add", "add_")
    two = len(args) == 2 and all(isinstance(a, fx.Node) for a in args) and not node.kwargs
    return named and two and args[0] is not args[1]


def called(node: fx.Node) -> str:
    """The name of the module that ``node`` calls."""
    return str(node.target)


def module_of(node: Any, modules: dict[str, nn.Module]) -> nn.Module | None:
    """The module that ``node`` calls, if it calls one."""
    return modules.get(called(node)) if isinstance(node, fx.Node) and node.op == "call_module" else None


def only_input(node: fx.Node) -> fx.Node | None:
    """The one node whose value ``node`` takes as its only argument or first one."""
    inputs = node.all_input_nodes
    return inputs[0] if len(inputs) == 1 else None


def has_one_argument(call: fx.Node) -> bool:
    """Whether the input is all that is passed: a low-rank layer also takes a residual and a ReLU."""
    return len(call.args) + len(call.kwargs) == len(call.all_input_nodes) == 1


def writes(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether ``node`` may change a tensor that it gets."""
    if node.op == "call_module":
        return any(getattr(module, "inplace", False) for module in modules[called(node)].modules())
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    flags = (*node.args, node.kwargs.get("inplace"))  # F.relu(x, True)
    named = name in (augmented.__name__, "setitem") or (name.endswith("_") and not name.endswith("__"))
    return named or bool(out_arguments(node)) or any(flag is True for flag in flags)


def out_arguments(node: fx.Node) -> list[fx.Node]:
    """The tensors that ``node`` is told to write to, by the keyword ``out``."""
    found: list[fx.Node] = []
    map_arg(node.kwargs.get("out"), found.append)  # None is what F.normalize passes
    return found
