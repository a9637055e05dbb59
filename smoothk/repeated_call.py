"""The checks and choices of the last call of smoothk's kernel with a pair of factors, kept for the calls after it.

On small images they take as long as the convolution. The call is made again, with the operator and nothing else, where
the input is of the same kind, the factors are as they were, and nobody watches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .factor_cache import state_of


class RepeatedCall:
    """A call of the kernel on a batch of images, without gradients.

    Args:
        input, v, u, bias: of the call that was made.
        method, options: that were asked for.
        output_shape: of its result.
        arguments: of the operator from ``packed`` on: packed; then, after bias and residual, numbers; then the layout.
    """

    def __init__(
        self,
        input: Tensor,
        v: Tensor,
        u: Tensor,
        bias: Tensor | None,
        method: str,
        options: tuple[Any, ...],
        output_shape: tuple[int, ...],
        arguments: tuple[Tensor, tuple[Any, ...], bool],
    ) -> None:
        self.u, self.bias, self.arguments = u, bias, arguments  # not v: the call is kept for as long as that lives
        self.method, self.options = method, options
        self.shape, self.stride, self.dtype, self.output_shape = input.shape, input.stride(), input.dtype, output_shape
        self.state = state_of(v, u)

    def fits(
        self,
        input: Tensor,
        v: Tensor,
        u: Tensor,
        bias: Tensor | None,
        method: str,
        options: tuple[Any, ...],
        residual: Tensor | None,
    ) -> bool:
        """Whether a call with these, and the same v, would end in the same operator with the same arguments."""
        return (
            type(input) is Tensor
            and input.shape == self.shape
            and input.stride() == self.stride
            and input.dtype is self.dtype
            and input.is_cpu
            and u is self.u
            and bias is self.bias
            and method == self.method
            and options == self.options
            and (
                residual is None
                or (
                    type(residual) is Tensor
                    and residual.shape == self.output_shape
                    and residual.dtype is self.dtype
                    and residual.is_cpu
                )
            )
            and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
            and not (torch.jit.is_tracing() or torch.compiler.is_exporting())
            and torch._C._functorch.peek_interpreter_stack() is None
            and forward_ad._current_level < 0
            and state_of(v, u) == self.state
        )

    def __call__(self, input: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        packed, numbers, channels_last = self.arguments
        op = torch.ops.smoothk.low_rank_conv_fused
        return op(input, packed, self.bias, residual, *numbers, relu, channels_last, False)[0]
