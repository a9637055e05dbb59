"""Fake kernels and autograd of the operators that torch.compile must not look into: one set of schemas, a namespace
each for C++ (``smoothk``), Triton (``smoothk_triton``) and PyTorch (``smoothk_torch``).

The backward of the difference penalty is an operator too, and is differentiable: its own derivative is taken through
`smoothk.reference`. ``polar_factors`` has no second derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from . import reference

TORCH = "smoothk_torch"


def register(namespace: str) -> None:
    """Register the fake kernels and the autograd of ``namespace``'s operators, whose schemas and kernels are there."""
    penalty = f"{namespace}::difference_penalty"
    backward = f"{penalty}_backward"

    def penalty_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needed = [weight for weight, needs in zip(ctx.saved_tensors, ctx.needs_input_grad[0], strict=True) if needs]
        op = getattr(torch.ops, namespace).difference_penalty_backward

        def gradients(grad: Tensor) -> list[Tensor]:
            return op(grad, needed, *ctx.options)

        grads = iter(_of_a_batch(gradients, grad) if _is_batch(grad) else gradients(grad))
        return [next(grads) if needs else None for needs in ctx.needs_input_grad[0]], *(None for _ in ctx.options)

    register_fake(penalty, _fake_penalty)
    register_fake(backward, _fake_backward)
    register_fake(f"{penalty}_accumulate_", _fake_accumulate)
    register_autograd(penalty, penalty_backward, setup_context=_save_penalty)
    register_autograd(backward, _backward_backward, setup_context=_save_backward)


def _is_batch(grad: Tensor) -> bool:
    """Whether this stands for many, under `torch.func.vmap` or, as of another kind, with ``is_grads_batched=True``."""
    kinds = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor
    return not torch.compiler.is_compiling() and any(is_kind(grad) for is_kind in kinds)


def _of_a_batch(gradients: Callable[[Tensor], list[Tensor]], grad: Tensor) -> list[Tensor]:
    """``gradients(grad)``, which is linear, from those of every order alone."""
    units = torch.eye(len(grad), dtype=grad.dtype, device=grad.device)
    parts = [[factor * part for part in gradients(unit)] for factor, unit in zip(grad, units, strict=True)]
    return [reference.total_of(terms) for terms in zip(*parts, strict=True)]


def register_low_rank_conv() -> None:
    """Register the fake kernels of the C++ operators of the low-rank convolution; `smoothk.low_rank_ops` has the one
    with a derivative."""
    register_fake("smoothk::low_rank_conv_pack", _fake_pack)
    register_fake("smoothk::low_rank_conv_fused", _fake_fused)


def _fake_pack(v: Tensor, u: Tensor, groups: int) -> Tensor:
    from .backend import extension

    size = extension().low_rank_conv_packed_size(list(v.shape), list(u.shape), groups)
    return v.new_empty(size, dtype=torch.float32)


def _fake_fused(input: Tensor, packed: Tensor, bias: Any, residual: Any, *options: Any) -> tuple[Tensor, Tensor]:
    numbers, _, channels_last, with_z = options
    v_shape, u_shape, output_size = numbers[:4], numbers[4:8], numbers[-2:]
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    size = (input.shape[0], u_shape[0], *output_size)
    y = input.new_empty(size).contiguous(memory_format=memory_format)
    if not with_z:
        return y, input.new_empty(0)
    width = input.shape[3] if u_shape[3] > 1 else output_size[1]
    z = input.new_empty((input.shape[0], v_shape[0], output_size[0], width))
    return y, z.contiguous(memory_format=torch.channels_last)


def register_polar_factors(
    namespace: str, kernel: Callable[[list[Tensor], str, str], tuple[Tensor, list[Tensor]]]
) -> None:
    """Define ``polar_factors`` in ``namespace``: ``‖W‖_*``, whose gradient is U Vᵀ, and U Vᵀ of every weight.

    Nothing differentiates U or V, so repeated singular values are harmless, and a second derivative is an error.

    Args:
        kernel: computes what `reference.polar_factors` does.
    """
    name = f"{namespace}::polar_factors"
    torch.library.define(name, "(Tensor[] weights, str unfolding, str method) -> (Tensor, Tensor[])")
    torch.library.impl(name, "default", kernel)
    register_fake(name, _fake_polar_factors)
    register_autograd(name, _polar_factors_backward, setup_context=_save_polar_factors)


def _fake_polar_factors(weights: list[Tensor], *options: str) -> tuple[Tensor, list[Tensor]]:
    factors = [torch.empty(w.shape, dtype=reference.compute_dtype(w.dtype), device=w.device) for w in weights]
    return _fake_penalty(weights, range(len(weights))), factors


def _save_polar_factors(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    ctx.set_materialize_grads(False)
    ctx.dtypes = [weight.dtype for weight in inputs[0]]
    ctx.save_for_backward(*output[1])


def _polar_factors_backward(ctx: Any, grads: Tensor, second: list[Tensor | None]) -> tuple[Any, ...]:
    if any(grad is not None for grad in second):
        raise RuntimeError("nuclear_norm has no second derivative: the singular vectors are not differentiated")
    rows = zip(grads, ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[0], strict=True)
    return [(g.to(x.device) * x).to(dtype) if needs else None for g, x, dtype, needs in rows], None, None


def _fake_penalty(weights: list[Tensor], orders: Sequence[int], *options: Any) -> Tensor:
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
        by_grad = torch.stack(along)
        seconds = torch.autograd.grad(grad @ by_grad, weights, create_graph=keep_graph, materialize_grads=True)
    return by_grad, list(seconds), *(None for _ in ctx.options)
