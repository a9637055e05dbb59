"""From call to call of `SmoothnessPenalty.accumulate_grad`: what was found out about the tensors, for the next ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .backend import PLAIN
from .functional import accumulate_by_kernel
from .reference import result_dtype
from .selection import SelectedWeight

EPS = 1e-8


class Call(NamedTuple):
    """How `accumulate_grad` treats the weights that there are."""

    kind: dict[str, Any]  # dtype and device of the result
    active: list[int]  # the weights that are not frozen, to which the others refer
    orders: list[int]  # of the difference penalty
    without_grad: list[int]  # those weights it is of whose .grad is missing
    options: dict[str, Any]  # of it, with the groups it is computed in


class Again(NamedTuple):
    """The last call once more, where all of it was one kernel's, with little to compare first: after a backward pass no
    cache holds this code any more, and a line of it takes five times as long as in a second call in a row.

    A kernel looks at its tensors anew and refuses before it writes. What is compared is what it does not see.
    """

    settings: tuple[Any, ...]  # of the penalty
    selected: Sequence[SelectedWeight]
    weights: Sequence[nn.Parameter]  # those of `selected` in the last call
    trained: Sequence[bool]
    active: Sequence[nn.Parameter]
    backend: str
    options: tuple[Any, ...]  # of the kernel

    @classmethod
    def of(
        cls,
        call: Call,
        settings: tuple[Any, ...],
        selected: Sequence[SelectedWeight],
        weights: Sequence[nn.Parameter],
    ) -> Again | None:
        """None where another call has to look again."""
        groups, options = call.options["groups"], call.options
        one_kernel = [len(group) for group, _ in groups] == [len(call.active)] and groups[0][1] != "torch"
        alike = len({(weight.dtype, weight.device) for weight in weights}) == 1
        if not one_kernel or not alike or len(weights) < len(selected):
            return None
        trained = [weight.requires_grad for weight in weights]
        active = [weights[i] for i in call.active]
        kernel = call.orders, options["dim"], options["norm"], options["normalized"], EPS
        return cls(settings, selected, weights, trained, active, groups[0][1], kernel)

    def accumulate(self, coefficients: Tensor, settings: tuple[Any, ...]) -> Tensor | None:
        """The terms times ``coefficients``, ``[orders]``; None, and nothing changed, if the call has to be prepared."""
        if settings != self.settings:
            return None
        grads: list[Tensor] = []
        device, dtype = coefficients.device, self.active[0].dtype
        for place, weight, trained in zip(self.selected, self.weights, self.trained, strict=True):
            now = weight if place.module is None else place.module._parameters.get(place.attribute)
            if now is not weight or type(weight) not in PLAIN or weight.dim() != place.axes:
                return None
            if weight.requires_grad is not trained or weight.dtype is not dtype:
                return None
            if trained:
                grad = weight.grad
                if grad is None or type(grad) not in PLAIN or grad.device != device:
                    return None
                grads.append(grad)
        try:
            return accumulate_by_kernel(self.backend, grads, self.active, coefficients, *self.options)
        except (RuntimeError, ValueError):
            return None


def kind_of(weights: Sequence[nn.Parameter]) -> dict[str, Any]:
    """dtype and device of a penalty on ``weights``."""
    return {"dtype": result_dtype(weights), "device": weights[0].device}


def check_grads(weights: Mapping[str, nn.Parameter]) -> None:
    """Raise where a ``.grad`` cannot be added into: TypeError for a sparse one, ValueError for an expanded one."""
    for name, weight in weights.items():
        grad = weight.grad
        if grad is None:
            continue
        if grad.layout != torch.strided:
            raise TypeError(f".grad of {name} must be a dense (strided) tensor, got layout {grad.layout}")
        if _is_expanded(grad):
            raise ValueError(f".grad of {name} must not be an expanded tensor, got strides {grad.stride()}")


def _is_expanded(tensor: Tensor) -> bool:
    if not tensor.numel() or tensor.is_contiguous():
        return False
    strides = tensor.stride()
    return 0 in strides and any(not stride and size > 1 for stride, size in zip(strides, tensor.shape, strict=True))


def grads_of(weights: Iterable[nn.Parameter]) -> list[Tensor]:
    """``.grad`` of every weight, created where it is missing."""
    grads = []
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        grads.append(weight.grad)
    return grads
