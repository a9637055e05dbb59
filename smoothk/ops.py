"""Fake kernels and autograd of the operators that are not written in PyTorch: one set of schemas, a namespace each for
C++ (``smoothk``) and Triton (``smoothk_triton``).

The backward of the penalty is an operator too, and is differentiable: its own derivative is taken through
`smoothk.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from . import reference


def register(namespace: str) -> None:
    """Register the fake kernels and the autograd of ``namespace``'s operators, whose schemas and kernels are there."""
    penalty = f"{namespace}::difference_penalty"
    backward = f"{penalty}_backward"

    def penalty_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needed = [weight for weight, needs in zip(ctx.saved_tensors, ctx.needs_input_grad[0], strict=True) if needs]
        op = getattr(torch.ops, namespace).difference_penalty_backward
        grads = iter(op(grad, needed, *ctx.options))
        return [next(grads) if needs else None for needs in ctx.needs_input_grad[0]], *(None for _ in ctx.options)

    register_fake(penalty, _fake_penalty)
    register_fake(backward, _fake_backward)
    register_fake(f"{penalty}_accumulate_", _fake_accumulate)
    register_autograd(penalty, penalty_backward, setup_context=_save_penalty)
    register_autograd(backward, _backward_backward, setup_context=_save_backward)


def _fake_penalty(weights: list[Tensor], orders: list[int], *options: Any) -> Tensor:
    device = weights[0].device if weights else "cpu"
    return torch.empty(len(orders), dtype=reference.result_dtype(weights), device=device)


def _fake_backward(grad: Tensor, weights: list[Tensor], *options: Any) -> list[Tensor]:
    return [torch.empty_like(weight) for weight in weights]


def _fake_accumulate(
    grads: list[Tensor], weights: list[Tensor], coefficients: Tensor, orders: list[int], *options: Any
) -> Tensor:
    return _fake_penalty(weights, orders)


def _save_penalty(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, *ctx.options = inputs
    ctx.save_for_backward(*weights)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad, weights, *ctx.options = inputs
    ctx.save_for_backward(grad, *weights)


def _backward_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    """Derivative of ``Σ_t <grads[t], Σ_k grad[k] * dP_k/dW[t]>`` by ``grad`` and by every weight."""
    grad, *weights = ctx.saved_tensors
    orders, dim, norm, normalized, eps = ctx.options
    keep_graph = torch.is_grad_enabled()  # for the derivatives after this one
    with torch.enable_grad():
        weights = [w.view_as(w) if w.requires_grad else w.detach().requires_grad_() for w in weights]
        terms = reference.difference_terms(weights, orders, dim=dim, norm=norm, normalized=normalized, eps=eps)
        along = []
        for term in terms:
            firsts = torch.autograd.grad(term, weights, create_graph=True, materialize_grads=True)
            products = [
                (g * first).sum(dtype=grad.dtype) for g, first in zip(grads, firsts, strict=True) if g is not None
            ]
            along.append(sum(products, grad.new_zeros(())))
        along = torch.stack(along)
        seconds = torch.autograd.grad(grad @ along, weights, create_graph=keep_graph, materialize_grads=True)
    return along, list(seconds), *(None for _ in ctx.options)
