"""The nuclear-norm term of `smoothk.SmoothnessPenalty`: scale-free or not, with polar factors that can be reused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from .backend import in_transform
from .functional import check_nuclear_options, is_dtensor, local_part, nuclear_norm, polar_factors
from .reference import compute_dtype, total_of

Weights = Mapping[str, Tensor]
_GRAPHS = 8  # torch.compile makes one for every count of uses, and by default no more than this of a function


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
        shared = self._polar_factors(weights)
        # One weight at a time needs the memory of one factor; only "polar" gains from many at once.
        groups = [weights] if self.options["method"] == "polar" else [{name: w} for name, w in weights.items()]
        total = torch.zeros((), dtype=torch.float64, device=coefficient.device)
        for group in groups:
            computed = () if shared else polar_factors(list(group.values()), **self.options)
            pairs = dict(zip(group, computed, strict=False))
            for name, weight in group.items():
                value, factor = pairs.get(name) or (_along(weight, shared[name]), shared[name])
                total = total + self._add(grads[name], weight, value, factor, coefficient).to(total.device)
        return total

    def _add(self, grad: Tensor, weight: Tensor, value: Tensor, factor: Tensor, coefficient: Tensor) -> Tensor:
        """Add the gradient of one weight's term, whose value is returned."""
        coefficient = coefficient.to(value.device, value.dtype)
        if not self.normalized:
            grad.addcmul_(factor, coefficient)  # without a product of the weight's size in memory
            return value
        # d(N / |W|) = N' / |W| - N W / |W|^3
        squares, norm = self._frobenius(weight, value.dtype)
        value = value / norm
        grad.addcmul_(factor, coefficient / norm)
        grad.addcmul_(weight.detach().to(value.dtype), -coefficient * value / squares)
        return value

    def _value(self, weights: Weights, factors: Weights) -> Tensor:
        if not (self.normalized or factors):
            return nuclear_norm(list(weights.values()), **self.options)
        device = next(iter(weights.values())).device
        return total_of(self._value_of(weight, factors.get(name)).to(device) for name, weight in weights.items())

    def _value_of(self, weight: Tensor, factor: Tensor | None) -> Tensor:
        value = nuclear_norm(weight, **self.options) if factor is None else _along(weight, factor)
        return value / self._frobenius(weight, value.dtype)[1] if self.normalized else value

    @staticmethod
    def _frobenius(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``‖W‖²`` and ``‖W‖`` to divide by: 1 for a zero weight, whose nuclear norm is 0."""
        squares = _whole(local_part(weight).to(dtype).square().sum(), weight)
        squares = torch.where(squares == 0, 1, squares)  # not `> 0`: a NaN has to come through
        return squares, squares.sqrt()

    def _polar_factors(self, weights: Weights) -> Weights:
        """Those of a call before, as long as they are of these weights and young enough; none where none are shared."""
        if self.every == 1 or in_transform():
            return {}
        shared = self._shared_factors if self.every < _GRAPHS else self._shared_factors_in_eager
        return shared(weights)

    def _shared_factors(self, weights: Weights) -> Weights:
        fits = self._factors.keys() == weights.keys() and all(
            _fits(self._factors[name], weight) for name, weight in weights.items()
        )
        if not fits or self._uses == self.every:
            with torch.inference_mode(False):  # for the calls that follow
                pairs = polar_factors(list(weights.values()), **self.options)
            self._factors = {name: factor for name, (_, factor) in zip(weights, pairs, strict=True)}
            # Those of weights with NaN or Inf are for this call alone: a checkpoint may be loaded before the next.
            self._uses = 0 if _are_finite(pairs) else self.every - 1
        self._uses += 1
        return self._factors

    _shared_factors_in_eager = _disable_dynamo(_shared_factors)

    def change(self, **options: Any) -> None:
        """Set one of `options`; factors that were computed by the old ones are gone."""
        self.options |= options
        self._factors = {}


def _are_finite(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether all these norms are; they count as such where that would be waiting for a GPU or break a graph."""
    return torch.compiler.is_compiling() or all(value.isfinite().item() for value, _ in pairs if value.is_cpu)


def _fits(factor: Tensor, weight: Tensor) -> bool:
    """Whether this can be the polar factor of such a weight: it has changed its kind where a model was moved."""
    kind = weight.shape, weight.device, compute_dtype(weight.dtype), is_dtensor(weight)
    is_real = type(factor) is Tensor or is_dtensor(factor)  # not of a call in FakeTensorMode
    return is_real and (factor.shape, factor.device, factor.dtype, is_dtensor(factor)) == kind


def _along(weight: Tensor, factor: Tensor) -> Tensor:
    """``<W, X>``."""
    return _whole((local_part(weight).to(factor.dtype) * local_part(factor)).sum(), weight)


def _whole(value: Tensor, weight: Tensor) -> Tensor:
    """A sum over `local_part` of ``weight`` as one over all of it."""
    if not is_dtensor(weight):
        return value
    from .distributed import sum_over_shards

    return sum_over_shards(value, weight)
