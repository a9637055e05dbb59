"""Factors fitted to what the dense layers gave: least squares on unlabelled inputs, in closed form, no gradient step.

Truncation changes the input of every later layer. Layer by layer, in the order of the calls, the factors are chosen so
that the compressed layer, on the inputs that the compressed model gives it, comes closest to the dense layer on the
dense model's: the asymmetric reconstruction of Zhang, Zou, He & Sun, "Accelerating very deep convolutional networks for
classification and detection" (arXiv 1505.06798), without its treatment of the ReLU. In the channel scheme this is
reduced-rank regression (Izenman, 1975). In the spatial one the regressed weight is truncated in the metric of the
k_h x 1 patches, all columns alike, and ``u`` is then the exact least-squares solution for that ``v``.

Linear layers behind the last low-rank one, a classifier that stayed dense, are fitted as well: they can undo a part of
what is lost before them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .candidates import find_candidates
from .layers import Conv, _LowRank
from .macs import run
from .regression import Fitted, fit, patches, rows
from .transposed import as_linear, transposed_linear_types

_FINE = 1 << 25  # entries of patches that are formed at a time


@dataclass
class Moments:
    """Sums over samples, by group, float64: patches ``x`` ``[groups, f]``, dense outputs ``y``, their products."""

    count: int = 0
    x: Tensor = field(init=False)
    y: Tensor = field(init=False)
    xx: Tensor = field(init=False)  # [groups, f, f]
    yx: Tensor = field(init=False)  # [groups, rows, f]
    eps: float = 0.0  # rounding of a product

    def add(self, x: Tensor, y: Tensor) -> None:
        """``x`` ``[groups, f, samples]``, ``y`` ``[groups, rows, samples]``."""
        if not self.count:
            groups, columns, zeros = *x.shape[:2], partial(x.new_zeros, dtype=torch.float64)
            self.x, self.xx = zeros(groups, columns), zeros(groups, columns, columns)
            self.y, self.yx = zeros(groups, y.shape[1]), zeros(groups, y.shape[1], columns)
        self.count += x.shape[-1]
        self.eps = torch.finfo(x.dtype).eps
        self.x += x.sum(-1, dtype=torch.float64)
        self.y += y.sum(-1, dtype=torch.float64)
        self.xx += (x @ x.mT).double()
        self.yx += (y @ x.mT).double()


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
    weights of the linear layers behind the last of them.

    In place; no gradient and no label. Each layer takes a pass of both models over ``batches`` as far as that layer,
    batch norm of ``small`` normalising by each batch; recalibrate it afterwards. A layer whose error on ``batches``
    would not fall keeps what it has.

    Args:
        model: the dense model; not changed.
        small: made from it by `smoothk.factorize`. After an error it is as it was.
        batches: re-iterable of input batches: a tensor, or the tuple or dict of the model's arguments. Some hundred
            inputs each, where there is batch norm, and some thousand in all.
        ridge: weight of the distance to the dense weight, as a share of the inputs' mean square; at least 0. It decides
            in directions that the inputs do not reach.
        together: layers fitted in one pass; more are faster, and see inputs that the others of the pass do not change.
        exclude: names of layers to leave as they are.
        importance: by layer, a positive semidefinite ``[groups, C_out/groups, C_out/groups]``: what an error of the
            outputs costs, up to a factor. `smoothk.importance.output_importance` finds it; default: all cost the same.

    Returns:
        ``small``.

    Raises:
        TypeError, ValueError: an argument of another type or out of its range; no batches; NaN or Inf in a layer's
            input or output. Whatever the models raise on a batch is passed on.
    """
    for name, network in (("model", model), ("small", small)):
        if not isinstance(network, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(network).__name__}")
    if not ridge >= 0:
        raise ValueError(f"ridge must be at least 0, got {ridge}")
    if not isinstance(together, int) or isinstance(together, bool) or together < 1:
        raise ValueError(f"together must be an int of at least 1, got {together!r}")
    if isinstance(exclude, str):
        raise TypeError(f"exclude must be a collection of names, got {exclude!r}")
    pairs = {name: (model.get_submodule(name), layer) for name, layer in _fitted_layers(small) if name not in exclude}
    pairs = {name: pair for name, pair in pairs.items() if not isinstance(pair[0], _LowRank)}
    before = [(p, p.detach().clone()) for _, layer in pairs.values() for p in layer.parameters()]
    try:
        with torch.no_grad(), _evaluating(model), normalising_by_batch(small):
            order = _call_order(small, {name: layer for name, (_, layer) in pairs.items()}, batches)
            names = list(order.calls)
            low_rank = [i for i, name in enumerate(names) if isinstance(pairs[name][1], _LowRank)]
            names = [name for i, name in enumerate(names) if i in low_rank or i > max(low_rank, default=len(names))]
            for start in range(0, len(names), together):
                part = names[start : start + together]
                found = _collect(model, small, {name: pairs[name] for name in part}, order, batches)
                for name, moments in found.items():
                    dense, layer = pairs[name]
                    weights, normalised = (importance or {}).get(name), name in order.normalised
                    fit(_torch_layer(dense), layer, moments, ridge, normalised, weights, name)
    except BaseException:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        raise
    return small


def _fitted_layers(small: nn.Module) -> Iterator[tuple[str, Fitted]]:
    """Low-rank layers, and linear ones that could have been."""
    for name, layer in small.named_modules():
        if isinstance(layer, _LowRank):
            yield name, layer
    for name, layer in find_candidates(small).layers.items():
        if layer is small.get_submodule(name) and isinstance(layer, nn.Linear):
            yield name, layer


def _torch_layer(dense: nn.Module) -> Conv | nn.Linear:
    """``dense`` with its weight as `fit` reads it."""
    return as_linear(dense) if isinstance(dense, transposed_linear_types()) else cast(Conv | nn.Linear, dense)


def _call_order(small: nn.Module, layers: dict[str, nn.Module], batches: Iterable[Any]) -> _Order:
    order, outputs = _Order(), {}
    handles = []

    def called(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            order.calls[name] = order.calls.get(name, 0) + 1
            outputs[name] = output

        return hook

    def normalise(module: nn.Module, args: tuple) -> None:
        order.normalised.update(name for name, output in outputs.items() if args and args[0] is output)

    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_hook(called(name)))
        for module in small.modules():
            if isinstance(module, _BatchNorm):
                handles.append(module.register_forward_pre_hook(normalise))
        for batch in batches:
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
    found = {name: Moments() for name in pairs}
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
            x, y = patches(module, args[0] if args else kwargs["input"]), outputs[name].pop(0)
            size = max(_FINE // max(x.shape[0] * x.shape[1], 1), 1)
            for part, wanted in zip(x.split(size, -1), y.split(size, -1), strict=True):
                found[name].add(part, wanted)
            count()

        return hook

    handles = []
    try:
        for name, (dense, layer) in pairs.items():
            handles.append(dense.register_forward_hook(keep(name)))
            handles.append(layer.register_forward_pre_hook(meet(name), with_kwargs=True))
        for batch in batches:
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


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def normalising_by_batch(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, but for batch norm, which normalises by each batch and forgets it."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    state = [(norm, [buffer.clone() for buffer in norm.buffers()]) for norm in norms]
    with _evaluating(model):
        try:
            for norm in norms:
                norm.train()
            yield
        finally:
            for norm, buffers in state:
                for buffer, value in zip(norm.buffers(), buffers, strict=True):
                    buffer.copy_(value)
