"""Factors fitted to what the dense layers gave: least squares on unlabelled inputs, in closed form, no gradient step.

Truncation changes the input of every later layer. Layer by layer, in the order of the calls, the factors are chosen so
that the compressed layer, on the inputs that the compressed model gives it, comes closest to the dense layer on the
dense model's: the asymmetric reconstruction of Zhang, Zou, He & Sun, "Accelerating very deep convolutional networks for
classification and detection" (arXiv 1505.06798), without its treatment of the ReLU. In the channel scheme this is
reduced-rank regression (Izenman, 1975). In the spatial one the regressed weight is truncated in the metric of the
k_h x 1 patches, all columns alike, and ``u`` is then the exact least-squares solution for that ``v``.

Errors can be weighed by what the outputs matter to the output of the model, ``M``, the weight matrix of Izenman's
theorem: then ``M^(1/2) W`` is truncated in place of the regressed weight ``W``.

Linear layers behind the last low-rank one, as a classifier that stayed dense, are fitted as well: they can undo a part
of what is lost before them.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .batch_norm import normalising_by_batch
from .candidates import find_candidates
from .layers import Conv, _LowRank
from .macs import run
from .outputs import not_empty
from .regression import Fitted, can_fit, directions, fit, patches, rows
from .transposed import as_linear, transposed_linear_types

_FINE = 1 << 25  # entries of patches that are formed at a time


@dataclass
class Moments:
    """Sums over samples, by group, float64: patches ``x`` ``[groups, f]``, dense outputs ``y``, their products.

    Where there is a ``basis`` ``[groups, k, f]``, patches are taken along it, with k in place of f.
    """

    basis: Tensor | None = None
    count: int = 0
    x: Tensor = field(init=False)
    y: Tensor = field(init=False)
    xx: Tensor = field(init=False)  # [groups, f, f]
    yx: Tensor = field(init=False)  # [groups, rows, f]
    yy: Tensor = field(init=False)  # [groups], of squares
    eps: float = 0.0  # rounding of a product
    paired: bool = True  # whether both models have given the same number of samples

    def add(self, x: Tensor, y: Tensor) -> None:
        """``x`` ``[groups, f, samples]``, ``y`` ``[groups, rows, samples]``."""
        if self.basis is not None:
            x = self.basis.to(x.dtype) @ x
        if not self.count:
            groups, columns, zeros = *x.shape[:2], partial(x.new_zeros, dtype=torch.float64)
            self.x, self.xx = zeros(groups, columns), zeros(groups, columns, columns)
            self.y, self.yx = zeros(groups, y.shape[1]), zeros(groups, y.shape[1], columns)
            self.yy = zeros(groups)
        self.count += x.shape[-1]
        self.eps = torch.finfo(x.dtype).eps
        self.x += x.sum(-1, dtype=torch.float64)
        self.y += y.sum(-1, dtype=torch.float64)
        self.xx += (x @ x.mT).double()
        self.yx += (y @ x.mT).double()
        self.yy += y.square().sum((1, 2), dtype=torch.float64)


@dataclass
class _Order:
    """Layers by their first call, how often each is called, and those whose output batch norm takes."""

    calls: dict[str, int] = field(default_factory=dict)
    normalised: set[str] = field(default_factory=set)


class _Done(Exception):
    """Raised by a hook: what comes after is of no interest."""


def refit_factors(
    model: nn.Module,
    small: nn.Module,
    batches: Iterable[Any],
    *,
    ridge: float = 1e-2,
    together: int = 1,
    exclude: Collection[str] = (),
    importance: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Fit the factors (and the bias) of every low-rank layer of ``small`` to the same layer of ``model``, and the
    weights of the linear layers called behind the last low-rank one.

    In place; no gradient and no label. Each layer takes a pass of both models over ``batches`` as far as that layer,
    batch norm normalising by each batch; recalibrate that of ``small`` afterwards, with ``model`` as its reference. A
    layer whose error on ``batches`` would not fall keeps what it has. So does a layer that does not get as many inputs
    in both models (experts, early exits), and a linear layer whose inputs the two models do not choose alike
    (proposals, random numbers), that shares a parameter with another module, or that cannot be factorised for another
    reason.

    A layer of more than `smoothk.regression.WIDE` inputs, channels times kernel, is fitted in the directions that its
    dense weight reads, in the spatial scheme in those that its ``v`` does: the covariance of all would take gigabytes.
    Where even these are too many it keeps what it has.

    Args:
        model: the dense model; not changed.
        small: made from it by `smoothk.factorize`. After an error it is as it was.
        batches: re-iterable of input batches: a tensor, or the tuple or dict of the model's arguments. Some hundred
            inputs each, where there is batch norm, and some thousand in all.
        ridge: weight of the distance to the dense weight, as a share of the inputs' mean square; at least 0. It decides
            in directions that the inputs do not reach. Unless it is 0, ``(f / n)³`` is added for ``n`` samples of ``f``
            entries, as it is to the small ridges of what follows: a fit to few samples is a fit to their noise.
        together: layers fitted in one pass; more are faster, and see inputs that the others of the pass do not change.
        exclude: names of layers to leave as they are.
        importance: by layer, a positive semidefinite ``[groups, C_out/groups, C_out/groups]``: what an error of the
            outputs costs, up to a factor. `smoothk.importance.output_importance` finds it. Outputs of a low-rank layer
            that is missing here count alike; others are not looked at.

    Returns:
        ``small``.

    Raises:
        TypeError, ValueError: an argument of another type or out of its range; no batches, or an empty one; NaN or Inf
            in a layer's input or output. Whatever the models raise on a batch is passed on.
    """
    for name, network in (("model", model), ("small", small)):
        if not isinstance(network, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(network).__name__}")
    if not ridge >= 0:
        raise ValueError(f"ridge must be at least 0, got {ridge}")
    if not isinstance(together, int) or isinstance(together, bool) or together < 1:
        raise ValueError(f"together must be an int of at least 1, got {together!r}")
    low_rank = {name: layer for name, layer in small.named_modules() if isinstance(layer, _LowRank)}
    skipped, costs = _excluded(small, exclude), _checked(importance or {}, low_rank)
    before: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad(), normalising_by_batch(model), normalising_by_batch(small):
            order = _call_order(small, {**low_rank, **_linear_layers(small)}, batches)
            names = list(order.calls)
            last = max((i for i, name in enumerate(names) if name in low_rank), default=len(names))
            names = [name for i, name in enumerate(names) if (i > last or name in low_rank) and name not in skipped]
            pairs = {name: (model.get_submodule(name), cast(Fitted, small.get_submodule(name))) for name in names}
            pairs = {n: pair for n, pair in pairs.items() if not isinstance(pair[0], _LowRank) and can_fit(pair[1])}
            before = [(p, p.detach().clone()) for _, layer in pairs.values() for p in layer.parameters()]
            for start in range(0, len(pairs), together):
                part = dict(list(pairs.items())[start : start + together])
                for name, moments in _collect(model, small, part, order, batches).items():
                    dense, layer = pairs[name]
                    normalised = name in order.normalised
                    fit(_torch_layer(dense), layer, moments, ridge, normalised, costs.get(name), name)
                    del moments  # which may be gigabytes, before the next ones are
    except BaseException:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        raise
    return small


def _excluded(small: nn.Module, exclude: Collection[str]) -> set[str]:
    if isinstance(exclude, str):
        raise TypeError(f"exclude must be a collection of names, got {exclude!r}")
    modules = dict(small.named_modules(remove_duplicate=False))
    unknown = sorted(set(exclude) - modules.keys())
    if unknown:
        raise ValueError(f"exclude must name modules of the model, got {unknown[0]!r}")
    named = [modules[name] for name in exclude]  # any of several names of a module
    return {name for name, module in modules.items() if module in named}


def _checked(importance: Mapping[str, Tensor], layers: Mapping[str, _LowRank]) -> dict[str, Tensor]:
    """What ``importance`` says of ``layers``, float64."""
    checked = {}
    for name, layer in layers.items():
        if name not in importance:
            continue
        costs, groups = importance[name], getattr(layer, "groups", 1)
        rows = layer.weight.shape[0] // groups
        if tuple(costs.shape) != (groups, rows, rows):
            raise ValueError(f"importance of {name!r} must be {[groups, rows, rows]}, got {list(costs.shape)}")
        if not torch.isfinite(costs).all():
            raise ValueError(f"importance of {name!r} must be finite, got NaN or Inf")
        checked[name] = costs.to(layer.v.device, torch.float64)
    return checked


def _linear_layers(small: nn.Module) -> dict[str, nn.Linear]:
    """Those that could have been factorised, but share no parameter."""
    uses = Counter(id(p) for module in small.modules() for p in module._parameters.values() if p is not None)
    return {
        name: layer
        for name, layer in find_candidates(small).layers.items()
        if layer is small.get_submodule(name)
        and isinstance(layer, nn.Linear)
        and all(uses[id(p)] == 1 for p in layer.parameters())
    }


def _torch_layer(dense: nn.Module) -> Conv | nn.Linear:
    """``dense`` with its weight as `fit` reads it."""
    return as_linear(dense) if isinstance(dense, transposed_linear_types()) else cast(Conv | nn.Linear, dense)


def _call_order(small: nn.Module, layers: dict[str, nn.Module], batches: Iterable[Any]) -> _Order:
    order, handles = _Order(), []
    outputs: dict[str, weakref.ref[Tensor]] = {}

    def called(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            order.calls[name] = order.calls.get(name, 0) + 1
            outputs[name] = weakref.ref(output)

        return hook

    def normalise(module: nn.Module, args: tuple) -> None:
        order.normalised.update(name for name, output in outputs.items() if args and args[0] is output())

    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_hook(called(name)))
        for module in small.modules():
            if isinstance(module, _BatchNorm):
                handles.append(module.register_forward_pre_hook(normalise))
        for batch in not_empty(batches, "batches"):
            run(small, batch)
            return order
    finally:
        for handle in handles:
            handle.remove()
    raise ValueError("batches must hold at least one batch, got none")


def _collect(
    model: nn.Module,
    small: nn.Module,
    pairs: dict[str, tuple[nn.Module, Fitted]],
    order: _Order,
    batches: Iterable[Any],
) -> dict[str, Moments]:
    """The moments of ``pairs``: patches of the compressed model, outputs of the dense one."""
    found = {name: Moments(directions(_torch_layer(dense), layer)) for name, (dense, layer) in pairs.items()}
    outputs: dict[str, list[Tensor]] = {}
    calls_left = 0

    def count() -> None:
        nonlocal calls_left
        calls_left -= 1
        if calls_left == 0:
            raise _Done

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            outputs[name].append(rows(pairs[name][1], output))
            count()

        return hook

    def meet(name: str) -> Callable:
        def hook(module: Fitted, args: tuple, kwargs: dict[str, Any]) -> None:
            x = patches(module, args[0] if args else kwargs["input"])
            y = outputs[name].pop(0) if outputs[name] else x[..., :0]
            if x.shape[-1] == y.shape[-1]:
                size = max(_FINE // max(x.shape[0] * x.shape[1], 1), 1)
                for part, wanted in zip(x.split(size, -1), y.split(size, -1), strict=True):
                    found[name].add(part, wanted)
            else:
                found[name].paired = False
            count()

        return hook

    handles = []
    try:
        for name, (dense, layer) in pairs.items():
            handles.append(dense.register_forward_hook(keep(name)))
            handles.append(layer.register_forward_pre_hook(meet(name), with_kwargs=True))
        for batch in not_empty(batches, "batches"):
            outputs.update({name: [] for name in pairs})
            for network in (model, small):
                calls_left = sum(order.calls[name] for name in pairs)
                try:
                    run(network, batch)
                except _Done:
                    pass
    finally:
        for handle in handles:
            handle.remove()
    return found
