"""Smoothness penalties of a whole model, for training loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from .backend import NAMES
from .functional import (
    accumulate_difference_penalty,
    check_backend,
    check_difference_options,
    check_dim,
    check_nuclear_options,
    difference_penalty,
    nuclear_norm,
)
from .reference import axes_of, result_dtype

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_EPS = 1e-8

Select = Callable[[str, nn.Module, nn.Parameter], bool]


def conv_and_linear_weights(name: str, module: nn.Module, parameter: nn.Parameter) -> bool:
    """Default of ``select``: the weight of a convolution or linear layer, depthwise convolutions left out."""
    if not name.endswith("weight") or parameter.dim() < 2:
        return False
    if isinstance(module, _CONVS):
        return module.groups == 1 or module.groups < module.in_channels
    return isinstance(module, nn.Linear)


def _named_weights(model: nn.Module | Iterable[nn.Parameter], select: Select | None) -> list[tuple[str, nn.Parameter]]:
    """The penalised parameters, tied ones once, under their first name."""
    if select is not None and not callable(select):
        raise TypeError(f"select must be callable, got {type(select).__name__}")
    if isinstance(model, Tensor):
        raise TypeError("model must be a module or an iterable of parameters, got a tensor; pass [tensor]")
    if not isinstance(model, Iterable | nn.Module):
        raise TypeError(f"model must be a module or an iterable of parameters, got {type(model).__name__}")
    if isinstance(model, nn.Module):
        select = select or conv_and_linear_weights
        candidates = [
            (f"{prefix}.{name}" if prefix else name, parameter)
            for prefix, module in model.named_modules()
            for name, parameter in module.named_parameters(prefix="", recurse=False)
            if select(f"{prefix}.{name}" if prefix else name, module, parameter)
        ]
    else:
        if select is not None:
            raise TypeError("select needs a module to walk through, got an iterable of parameters")
        candidates = [(str(i), parameter) for i, parameter in enumerate(model)]
    seen: set[int] = set()
    weights = []
    for name, parameter in candidates:
        if not isinstance(parameter, Tensor):
            raise TypeError(f"model must be a module or an iterable of parameters, got an item of {type(parameter)}")
        if not parameter.is_floating_point():
            raise TypeError(f"weight {name} must have a real floating-point dtype, got {parameter.dtype}")
        if id(parameter) not in seen:
            seen.add(id(parameter))
            weights.append((name, parameter))
    return weights


def _check_coefficient(name: str, value: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be finite and at least 0, got {value}")
    return float(value)


class SmoothnessPenalty(nn.Module):
    """``first_order·P₁ + second_order·P₂ + nuclear·‖W‖_*`` summed over the weights of a model.

    Two ways to use it, with the same result::

        loss = criterion(model(x), y) + penalty()  # differentiable
        loss.backward()

        loss = criterion(model(x), y)
        loss.backward()
        value = penalty.accumulate_grad()  # no autograd graph: adds into .grad, returns the value

    It holds references to the parameters, registers none, and has no state of its own but `scale`. Source: Runkel et
    al., "Smooth Model Compression without Fine-Tuning" (arXiv 2505.24469); coefficients and options are our reading.

    Args:
        model: a module, or an iterable of parameters.
        first_order, second_order, nuclear: coefficients λ ≥ 0 of the three terms; a term with coefficient 0 is not
            computed.
        dim, norm, normalized: as in `smoothk.difference_penalty`; ``normalized`` also divides the nuclear norm by
            ``‖W‖_F``.
        unfolding: as in `smoothk.nuclear_norm`.
        select: ``(name, module, parameter) -> bool``, called for every parameter of the model; default: weights of
            convolutions and linear layers, without depthwise ones. Tied weights count once. Transposed convolutions,
            embeddings, norms and low-rank layers are left out by default.
        backend: ``None``, ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: a negative or non-finite coefficient, an unknown option, or nothing to penalise.
        TypeError: a weight that is not real floating-point, or arguments of another type.

    Parameters frozen (``requires_grad=False``) at the time of a call add neither value nor gradient.
    """

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
    ) -> None:
        super().__init__()
        self.coefficients = {
            "first_order": _check_coefficient("first_order", first_order),
            "second_order": _check_coefficient("second_order", second_order),
            "nuclear": _check_coefficient("nuclear", nuclear),
        }
        check_difference_options(1, norm, _EPS)
        check_nuclear_options(unfolding, "auto")
        if backend not in (None, *NAMES):
            raise ValueError(f"backend must be None or one of {', '.join(map(repr, NAMES))}, got {backend!r}")
        self.dim, self.norm, self.normalized = check_dim(dim), norm, bool(normalized)
        self.unfolding, self.backend = unfolding, backend
        self._weights = _named_weights(model, select)
        if not self._weights:
            raise ValueError("model has no weight to penalise; pass select to choose parameters")
        self.scale = 1.0

    @property
    def scale(self) -> float:
        """Factor on every coefficient, for schedules and warm-up."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = _check_coefficient("scale", value)

    def extra_repr(self) -> str:
        terms = ", ".join(f"{name}={value:g}" for name, value in self.coefficients.items() if value)
        return (
            f"{len(self._weights)} weights, {terms or 'all coefficients 0'}, dim={self.dim}, norm={self.norm!r}, "
            f"normalized={self.normalized}, unfolding={self.unfolding!r}"
        )

    def _active(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, weight) for name, weight in self._weights if weight.requires_grad]

    def _term(self, name: str, weights: Sequence[Tensor]) -> Tensor:
        """One raw term over ``weights``, differentiable."""
        if name != "nuclear":
            order = 1 if name == "first_order" else 2
            return difference_penalty(
                weights, order, dim=self.dim, norm=self.norm, normalized=self.normalized, backend=self.backend
            )
        if not self.normalized:
            return nuclear_norm(weights, unfolding=self.unfolding, backend=self.backend)
        total = self._zero()
        for weight in weights:
            total = total + self._normalized_nuclear(weight).to(total.device)
        return total

    def _normalized_nuclear(self, weight: Tensor) -> Tensor:
        value = nuclear_norm(weight, unfolding=self.unfolding, backend=self.backend)
        squares = weight.to(value.dtype).square().sum()
        zero = squares == 0  # not `> 0`: a NaN has to come through
        return torch.where(zero, 0, value / torch.where(zero, 1, squares).sqrt())

    def _terms(self) -> list[tuple[str, float]]:
        return [(name, self.scale * c) for name, c in self.coefficients.items() if self.scale * c > 0]

    def _zero(self) -> Tensor:
        """0 of the result's dtype and device, which freezing weights does not change."""
        weights = [weight for _, weight in self._weights]
        return torch.zeros((), dtype=result_dtype(weights), device=weights[0].device)

    def forward(self) -> Tensor:
        """The penalty, differentiable: 0-dim, float32 (float64 for float64 weights), on the first weight's device."""
        weights = [weight for _, weight in self._active()]
        total = self._zero()
        for weight in weights:  # differentiable even where no term is active
            total = total + weight.reshape(-1)[:0].sum().to(device=total.device, dtype=total.dtype)
        for name, coefficient in self._terms():
            total = total + coefficient * self._term(name, weights)
        return total

    @torch.no_grad()
    def accumulate_grad(self) -> Tensor:
        """Add the penalty's gradient into ``.grad`` of every weight and return the penalty, detached.

        Call it after ``backward()`` and before ``optimizer.step()``, once per optimizer step; with a GradScaler after
        ``scaler.unscale_(optimizer)``. A missing ``.grad`` is created.

        Raises:
            TypeError: a ``.grad`` is not dense. Nothing has been changed then.
            BackendUnavailable: the backend asked for by name cannot run every term; nothing has been changed either.
        """
        named = self._active()
        for name, weight in named:
            if weight.grad is not None and weight.grad.layout != torch.strided:
                raise TypeError(f".grad of {name} must be a dense (strided) tensor, got layout {weight.grad.layout}")
        weights = [weight for _, weight in named]
        tensors = [*weights, *(weight.grad for weight in weights if weight.grad is not None)]
        for name, _ in self._terms():
            check_backend("nuclear_norm" if name == "nuclear" else "difference_penalty", self.backend, tensors)
        total = self._zero()
        for name, coefficient in self._terms():
            total = total + coefficient * self._accumulate(name, coefficient, weights)
        return total

    def _accumulate(self, name: str, coefficient: float, weights: Sequence[nn.Parameter]) -> Tensor:
        """Add one term's gradient into ``.grad``; returns the raw term."""
        order = {"first_order": 1, "second_order": 2, "nuclear": 0}[name]
        if order:
            weights = [w for w in weights if axes_of(w, self.dim, order)]  # the others keep even a missing .grad
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        grads = [weight.grad for weight in weights]
        if order:
            return accumulate_difference_penalty(
                weights,
                grads,
                torch.tensor([coefficient], dtype=torch.float64),
                [order],
                dim=self.dim,
                norm=self.norm,
                normalized=self.normalized,
                backend=self.backend,
            )[0]
        total = self._zero()
        for weight, grad in zip(weights, grads, strict=True):
            with torch.enable_grad():
                leaf = weight.detach().requires_grad_()
                value = self._term("nuclear", [leaf])
            grad.add_(torch.autograd.grad(value, leaf)[0], alpha=coefficient)
            total = total + value.detach().to(total.device)
        return total

    @torch.no_grad()
    def per_layer(self) -> dict[str, dict[str, Tensor]]:
        """Each active weight's raw terms, without coefficient or `scale`: ``{weight: {term: 0-dim tensor}}``.

        Terms whose coefficient is 0 are left out.
        """
        terms = [name for name, coefficient in self.coefficients.items() if coefficient > 0]
        return {name: {term: self._term(term, [weight]) for term in terms} for name, weight in self._active()}
