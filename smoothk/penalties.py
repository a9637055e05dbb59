"""Smoothness penalties of a whole model, for training loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .backend import NAMES, in_transform
from .functional import (
    accumulate_difference_penalty,
    check_axes,
    check_difference_options,
    check_dim,
    choose_backends,
    difference_terms,
    local_part,
    nuclear_op,
)
from .nuclear import NuclearTerm, Weights
from .penalty_calls import EPS, Again, Call, check_grads, grads_of, kind_of
from .reference import axes_of
from .selection import Select, select_weights
from .unfolding import check_unfolding

TERMS = ("first_order", "second_order", "nuclear")


def _check_coefficient(name: str, value: float) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be finite and at least 0, got {value}")
    return float(value)


def _sum_of(terms: Sequence[Tensor]) -> Tensor:
    """Of all entries of 1-dim tensors, with as few launches on a GPU as can be."""
    whole = terms[0] if len(terms) == 1 else torch.cat([*terms])
    return whole.squeeze(0) if len(whole) == 1 else whole.sum()


class SmoothnessPenalty(nn.Module):
    """``first_order·P₁ + second_order·P₂ + nuclear·‖W‖_*`` summed over the weights of a model.

    Two ways to use it, with the same result::

        loss = criterion(model(x), y) + penalty()  # differentiable
        loss.backward()

        loss = criterion(model(x), y)
        loss.backward()
        value = penalty.accumulate_grad()  # no autograd graph: adds into .grad, returns the value

    It registers no parameters and has no state of its own but its options, which may be set between calls, and the
    factors of ``every``. The parameters of a module are looked up at every call, so wrappers that replace them
    (`fully_shard`, ``to_empty``) are followed. Modules are not: build the penalty again when one was added or replaced,
    as heads are in fine-tuning. Source: Runkel et al., "Smooth Model Compression without Fine-Tuning"
    (arXiv 2505.24469); coefficients and options are our reading.

    Args:
        model: a module, or an iterable of parameters, all of which count: biases, too, and scales of norms.
        first_order, second_order, nuclear: coefficients λ ≥ 0 of the three terms; a term with coefficient 0 is not
            computed. The first one is not 0 unless it is set: pass ``first_order=0.0`` for another term alone.
        dim, norm, normalized: as in `smoothk.difference_penalty`; ``normalized`` also divides the nuclear norm by
            ``‖W‖_F``.
        unfolding: as in `smoothk.nuclear_norm`.
        select: ``(name, module, parameter) -> bool``, called for every parameter of the model; default: weights of
            convolutions and linear layers. Tied weights count once. Depthwise and transposed convolutions, embeddings,
            norms, low-rank layers and whatever is parametrised or pruned are left out by default, and transformers'
            ``Conv1D``, whose rows are inputs (select it together with ``dim=1``).
        backend: ``None``, ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.
        method: of `smoothk.nuclear_norm`.
        every: calls that share the polar factors of the nuclear norm. From the second to the last of them the term is
            ``<W, X>`` with gradient X, X being the factors of the first: a lower bound, and no decomposition. It keeps
            one copy of the weights in memory. A step that is compiled has as many graphs, or from 8 on a graph break
            there. What `torch.utils.checkpoint` computes again counts as a call.

    Raises:
        ValueError: a negative or non-finite coefficient, an unknown option, or nothing to penalise.
        TypeError: a weight that is not real floating-point, or arguments of another type.

    Parameters frozen (``requires_grad=False``) at the time of a call add neither value nor gradient.

    On several processes every one of them makes the calls. Sharded parameters (DTensor: FSDP2, tensor parallelism) give
    the value and the gradient of the whole weights (`smoothk.distributed`). `accumulate_grad` does not depend on how
    DDP or FSDP2 average gradients, nor on a precision to which FSDP2 casts parameters between forward and backward.
    """

    _again: Again | None = None  # of the last `accumulate_grad`

    def __init__(
        self,
        model: nn.Module | Iterable[nn.Parameter],
        first_order: float = 1e-3,
        second_order: float = 0.0,
        nuclear: float = 0.0,
        dim: int | Sequence[int] = 0,
        norm: str = "l2",
        normalized: bool = False,
        unfolding: str = "channel",
        select: Select | None = None,
        backend: str | None = None,
        *,
        method: str = "auto",
        every: int = 1,
    ) -> None:
        super().__init__()
        coefficients = (first_order, second_order, nuclear)
        self.coefficients = {
            name: _check_coefficient(name, value) for name, value in zip(TERMS, coefficients, strict=True)
        }
        self._weights = select_weights(model, select)
        if not self._weights:
            raise ValueError("model has no weight to penalise; pass select to choose parameters")
        self._nuclear = NuclearTerm(unfolding, method, bool(normalized), every, backend)
        self.dim, self.norm, self.backend = dim, norm, backend
        self._scale = 1.0
        # Tensors, written in place: a new scale reaches compiled code and CUDA graphs.
        self._values: list[float] = []
        self._lambdas: dict[torch.device, Tensor] = {}
        self._scaled: dict[torch.device, Tensor] = {}
        self._scaled_on(self._weights[0].current.device)

    # Options may be set between calls.

    @property
    def dim(self) -> tuple[int, ...]:
        """The axes that differences are taken along."""
        return self._dim

    @dim.setter
    def dim(self, dim: int | Sequence[int]) -> None:
        self._dim = check_dim(dim)
        for weight in self._weights:
            check_axes(self._dim, weight.axes, weight.name)

    @property
    def norm(self) -> str:
        """How differences are measured."""
        return self._norm

    @norm.setter
    def norm(self, norm: str) -> None:
        check_difference_options(1, norm, EPS)
        self._norm = norm

    @property
    def normalized(self) -> bool:
        """Whether terms are relative to the weights."""
        return self._nuclear.normalized

    @normalized.setter
    def normalized(self, normalized: bool) -> None:
        self._nuclear.normalized = bool(normalized)

    @property
    def unfolding(self) -> str:
        """The matrix whose nuclear norm is taken."""
        return self._nuclear.options["unfolding"]

    @unfolding.setter
    def unfolding(self, unfolding: str) -> None:
        check_unfolding(unfolding)
        self._nuclear.change(unfolding=unfolding)

    @property
    def backend(self) -> str | None:
        """Who computes it, where that was asked for by name."""
        return self._nuclear.options["backend"]

    @backend.setter
    def backend(self, backend: str | None) -> None:
        if backend not in (None, *NAMES):
            raise ValueError(f"backend must be None or one of {', '.join(map(repr, NAMES))}, got {backend!r}")
        self._nuclear.change(backend=backend)

    @property
    def scale(self) -> float:
        """Factor on every coefficient, for schedules and warm-up."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        value = _check_coefficient("scale", value)
        if value != self._scale:
            self._scale = value
            for device, scaled in self._scaled.items():
                torch.mul(self._lambdas[device], value, out=scaled)

    def extra_repr(self) -> str:
        terms = ", ".join(f"{name}={value:g}" for name, value in self.coefficients.items() if value)
        return (
            f"{len(self._weights)} weights, {terms or 'all coefficients 0'}, dim={self.dim}, norm={self.norm!r}, "
            f"normalized={self.normalized}, unfolding={self.unfolding!r}"
        )

    def forward(self) -> Tensor:
        """The penalty, differentiable: 0-dim, float32 (float64 for float64 weights), on the first weight's device."""
        weights, kind = self._active()
        if self._is_off or not weights:
            total = torch.zeros((), **kind)
            for weight in weights.values():  # differentiable, with a gradient of zeros
                total = total + local_part(weight).reshape(-1)[:0].sum().to(**kind)
            return total
        terms = self._terms(weights, self._nuclear).to(kind["device"])
        scaled = self._scaled_on(kind["device"]).clone()  # what a backward pass needs is not to change with `scale`
        return (scaled * terms).sum().to(kind["dtype"])

    @torch.no_grad()
    def accumulate_grad(self) -> Tensor:
        """Add the penalty's gradient into ``.grad`` of every weight and return the penalty, detached.

        Call it after ``backward()`` and before ``optimizer.step()``, once per optimizer step; with a GradScaler after
        ``scaler.unscale_(optimizer)``. A missing ``.grad`` is created.

        Raises:
            TypeError: a ``.grad`` is not dense. Nothing has been changed then.
            ValueError: a ``.grad`` is an expanded tensor, of which several entries are one, or some weights, but not
                all, are on the meta device; nothing has been changed.
            BackendUnavailable: the backend asked for by name cannot run every term; nothing has been changed either.
        """
        repeats = not torch.compiler.is_compiling() and not in_transform()
        if repeats and self._again is not None and self._scale:
            terms = self._again.accumulate(self._scaled_on(self._again.active[0].device), self._settings)
            if terms is not None:
                return _sum_of([terms])
        named = self._current()
        current = list(named.values())
        if self._is_off:
            return torch.zeros((), **kind_of(current))
        call = self._prepare(named)
        if repeats and not self.coefficients["nuclear"]:
            self._again = Again.of(call, self._settings, self._weights, current)
        return self._accumulate(call, named) if call.active else torch.zeros((), **call.kind)

    def _accumulate(self, call: Call, named: Mapping[str, nn.Parameter]) -> Tensor:
        names = list(named)
        active = {names[i]: named[names[i]] for i in call.active}
        weights, scaled, terms = list(active.values()), self._scaled_on(call.kind["device"]), []
        if call.orders:
            for i in call.without_grad:  # what has none afterwards is in no group
                weights[i].grad = torch.zeros_like(weights[i])
            into: list[Any] = [weight.grad for weight in weights]
            own = scaled if len(scaled) == len(call.orders) else scaled[: len(call.orders)]
            try:
                terms.append(accumulate_difference_penalty(weights, into, own, call.orders, **call.options))
            except Exception:
                for i in call.without_grad:
                    weights[i].grad = None
                raise
        if self.coefficients["nuclear"]:
            nuclear = self._nuclear.accumulate(active, dict(zip(active, grads_of(weights), strict=True)), scaled[-1])
            terms.append((scaled[-1] * nuclear).view(1))
        return _sum_of([term.to(**call.kind) for term in terms])

    def __getstate__(self) -> dict[str, Any]:
        # Neither what names backends, which another process may not have, nor tensors of a device it may not have.
        return {**self.__dict__, "_again": None, "_lambdas": {}, "_scaled": {}}

    def _prepare(self, named: Mapping[str, nn.Parameter]) -> Call:
        """Find out how to add into these weights' gradients, and raise what can be raised by them, before anything is
        written."""
        names, current = list(named), list(named.values())
        orders, active = self._orders, [i for i, weight in enumerate(current) if weight.requires_grad]
        weights, groups, without_grad = [current[i] for i in active], [], []
        check_grads({names[i]: current[i] for i in active})
        absent = [names[i] for i in active if current[i].is_meta]
        if absent and len(absent) < len(active):  # whose terms fail when others have been added
            raise ValueError(f"weight {absent[0]} must hold values as others do, got a tensor on the meta device")
        if orders:
            groups = choose_backends("difference_penalty", self.backend, weights, [weight.grad for weight in weights])
            # A weight too short for every order keeps even a missing .grad.
            wanted = {i for i, w in enumerate(weights) if w.grad is not None or axes_of(w, self.dim, min(orders))}
            groups = [([i for i in indices if i in wanted], chosen) for indices, chosen in groups]
            without_grad = [i for i in wanted if weights[i].grad is None]
        if self.coefficients["nuclear"]:
            choose_backends(nuclear_op(self._nuclear.options["method"]), self.backend, weights)
        options = {**self._difference_options, "groups": [group for group in groups if group[0]]}
        return Call(kind_of(current), active, orders, without_grad, options)

    @torch.no_grad()
    def per_layer(self) -> dict[str, dict[str, Tensor]]:
        """Each active weight's raw terms, without coefficient or `scale`: ``{weight: {term: 0-dim tensor}}``.

        Terms whose coefficient is 0 are left out.
        """
        names = [name for name, value in self.coefficients.items() if value]
        return {
            name: dict(zip(names, self._terms({name: weight}, self._nuclear.exact), strict=True) if names else ())
            for name, weight in self._active()[0].items()
        }

    @property
    def _orders(self) -> list[int]:
        return [order for order in (1, 2) if self.coefficients[TERMS[order - 1]]]

    @property
    def _settings(self) -> tuple[Any, ...]:
        return self.backend, self._dim, self._norm, self.normalized, *self.coefficients.values()

    @property
    def _is_off(self) -> bool:
        # Compiled code reads only tensors, so that a new scale does not compile it again.
        return not any(self.coefficients.values()) or (not torch.compiler.is_compiling() and self._scale == 0)

    def _active(self) -> tuple[dict[str, nn.Parameter], dict[str, Any]]:
        """The penalised parameters that are not frozen, by name, and dtype and device of results, which freezing does
        not change."""
        current = self._current()
        # A plain tensor is not frozen: it stands in for a parameter (`torch.func.functional_call`).
        active = {name: w for name, w in current.items() if w.requires_grad or not isinstance(w, nn.Parameter)}
        return active, kind_of(list(current.values()))

    def _current(self) -> dict[str, nn.Parameter]:
        """The weights by name; those that were tied since they were selected count once, under the first name."""
        current = {weight.name: weight.current for weight in self._weights}
        if len({*map(id, current.values())}) == len(current):
            return current
        first: dict[int, str] = {}
        for name, weight in current.items():
            first.setdefault(id(weight), name)
        return {name: current[name] for name in first.values()}

    def _scaled_on(self, device: torch.device) -> Tensor:
        """``scale * λ`` of the terms whose coefficient is not 0, float64 where ``device`` has it."""
        values = [value for value in self.coefficients.values() if value]
        if device not in self._scaled or self._values != values:
            if self._values != values:  # of every device
                self._values, self._lambdas, self._scaled = values, {}, {}
            dtype = torch.float32 if device.type == "mps" else torch.float64
            with torch.inference_mode(False):  # for every later call
                self._lambdas[device] = torch.tensor(values, dtype=dtype, device=device)
                self._scaled[device] = self._lambdas[device] * self._scale
        return self._scaled[device]

    def _terms(self, weights: Weights, nuclear: Callable[[Weights], Tensor]) -> Tensor:
        """The raw terms whose coefficient is not 0, ``[terms]``, differentiable."""
        terms = []
        if self._orders:
            terms.append(difference_terms(list(weights.values()), self._orders, **self._difference_options))
        if self.coefficients["nuclear"]:
            term = nuclear(weights)
            terms.append(term.reshape(1))
        return torch.cat(terms)

    @property
    def _difference_options(self) -> dict[str, Any]:
        return {"dim": self.dim, "norm": self.norm, "normalized": self.normalized, "backend": self.backend}
