"""Fake kernels and autograd of the C++ operators; imported once `smoothk._C` has registered them.

The backward of the penalty is an operator too, and is differentiable: its own derivative is taken through
`smoothk.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from . import reference


@register_fake("smoothk::difference_penalty")
def _(weights: list[Tensor], *options: Any) -> Tensor:
    return _scalar_like(weights)


@register_fake("smoothk::difference_penalty_backward")
def _(grad: Tensor, weights: list[Tensor], *options: Any) -> list[Tensor]:
    return [torch.empty_like(weight) for weight in weights]


@register_fake("smoothk::difference_penalty_accumulate_")
def _(grads: list[Tensor], weights: list[Tensor], *options: Any) -> Tensor:
    return _scalar_like(weights)


def _scalar_like(weights: list[Tensor]) -> Tensor:
    device = weights[0].device if weights else "cpu"
    return torch.empty((), dtype=reference.result_dtype(weights), device=device)


def _save_penalty(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, *ctx.options = inputs
    ctx.save_for_backward(*weights)


def _penalty_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needed = [weight for weight, needs in zip(ctx.saved_tensors, ctx.needs_input_grad[0], strict=True) if needs]
    grads = iter(torch.ops.smoothk.difference_penalty_backward(grad, needed, *ctx.options))
    return [next(grads) if needs else None for needs in ctx.needs_input_grad[0]], *(None for _ in ctx.options)


register_autograd("smoothk::difference_penalty", _penalty_backward, setup_context=_save_penalty)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad, weights, *ctx.options = inputs
    ctx.save_for_backward(grad, *weights)


def _backward_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    """Derivative of ``Σ <grads[t], grad * dP/dW[t]>`` by ``grad`` and by every weight."""
    grad, *weights = ctx.saved_tensors
    order, dim, norm, normalized, eps = ctx.options
    keep_graph = torch.is_grad_enabled()  # for the derivatives after this one
    with torch.enable_grad():
        weights = [w.view_as(w) if w.requires_grad else w.detach().requires_grad_() for w in weights]
        value = reference.difference_penalty(weights, order, dim=dim, norm=norm, normalized=normalized, eps=eps)
        firsts = torch.autograd.grad(value, weights, create_graph=True, materialize_grads=True)
        along = sum((g * first).sum(dtype=grad.dtype) for g, first in zip(grads, firsts, strict=True) if g is not None)
        seconds = torch.autograd.grad(grad * along, weights, create_graph=keep_graph, materialize_grads=True)
    return along, list(seconds), *(None for _ in ctx.options)


register_autograd("smoothk::difference_penalty_backward", _backward_backward, setup_context=_save_backward)
