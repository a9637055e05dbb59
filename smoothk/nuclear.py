"""The nuclear-norm term of `smoothk.SmoothnessPenalty`: scale-free or not, with polar factors that can be reused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .functional import check_nuclear_options, is_dtensor, local_part, nuclear_norm
from .reference import compute_dtype

Weights = dict[str, Tensor]


class NuclearTerm:
    """``Σ ‖W‖_*``, or ``Σ ‖W‖_* / ‖W‖_F`` where ``normalized``, over weights by name.

    With ``every > 1`` the polar factors X of a call serve the ``every - 1`` calls after it, which add ``<W, X>`` with
    gradient X: the value is a lower bound of the norm, exact for the weights that X was computed from.

    Args:
        unfolding, method, backend: as in `smoothk.nuclear_norm`.
        normalized: divide each weight's norm by its Frobenius norm.
        every: calls that share a polar factor, at least 1.
    """

    def __init__(self, unfolding: str, method: str, normalized: bool, every: int, backend: str | None) -> None:
        check_nuclear_options(unfolding, method)
        if not isinstance(every, int) or isinstance(every, bool):
            raise TypeError(f"every must be an int, got {type(every).__name__}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.normalized, self.every = normalized, every
        self.options: dict[str, Any] = {"unfolding": unfolding, "method": method, "backend": backend}
        self._factors: Weights = {}
        self._uses = 0

    def __call__(self, weights: Weights) -> Tensor:
        """The term, 0-dim and differentiable by every weight."""
        return self._value(weights, self._polar_factors(weights))

    def exact(self, weights: Weights) -> Tensor:
        """The term from polar factors of its own, which no other call shares."""
        return self._value(weights, {})

    def accumulate(self, weights: Weights, grads: Weights, coefficient: Tensor) -> Tensor:
        """Add ``coefficient`` times the term's gradient into ``grads``; returns the term without it."""
        factors = self._polar_factors(weights)
        # One weight at a time needs the memory of one factor; only "polar" gains from many at once.
        groups = [weights] if self.options["method"] == "polar" else [{name: w} for name, w in weights.items()]
        total = torch.zeros((), dtype=torch.float64, device=coefficient.device)
        for group in groups:
            with torch.enable_grad():
                leaves = {name: weight.detach().requires_grad_() for name, weight in group.items()}
                value = self._value(leaves, factors)
            gradients = torch.autograd.grad(value, leaves.values(), coefficient.to(value.device, value.dtype))
            for name, gradient in zip(group, gradients, strict=True):
                grads[name].add_(gradient)
            total = total + value.detach().to(total.device)
        return total

    def _value(self, weights: Weights, factors: Weights) -> Tensor:
        if not (self.normalized or factors):
            return nuclear_norm(list(weights.values()), **self.options)
        device = next(iter(weights.values())).device
        return sum(self._value_of(weight, factors.get(name)).to(device) for name, weight in weights.items())

    def _value_of(self, weight: Tensor, factor: Tensor | None) -> Tensor:
        if factor is None:
            value = nuclear_norm(weight, **self.options)
        else:
            value = _whole((local_part(weight).to(factor.dtype) * local_part(factor)).sum(), weight)
        if not self.normalized:
            return value
        squares = _whole(local_part(weight).to(value.dtype).square().sum(), weight)
        zero = squares == 0  # not `> 0`: a NaN has to come through
        return torch.where(zero, 0, value / torch.where(zero, 1, squares).sqrt())

    def _polar_factors(self, weights: Weights) -> Weights:
        """Those of a call before, as long as they are of these weights and young enough; none where none are shared."""
        if self.every == 1:
            return {}
        fits = self._factors.keys() == weights.keys() and all(
            self._factors[name].shape == weight.shape and self._factors[name].device == weight.device
            for name, weight in weights.items()
        )
        if not fits or self._uses == self.every:
            self._factors = {name: self._polar_factor(weight) for name, weight in weights.items()}
            self._uses = 0
        self._uses += 1
        return self._factors

    def _polar_factor(self, weight: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = weight.detach().to(compute_dtype(weight.dtype)).requires_grad_()
            value = nuclear_norm(leaf, **self.options)
        return torch.autograd.grad(value, leaf)[0]


def _whole(value: Tensor, weight: Tensor) -> Tensor:
    """A sum over `local_part` of ``weight`` as one over all of it."""
    if not is_dtensor(weight):
        return value
    from .distributed import sum_over_shards

    return sum_over_shards(value, weight)
