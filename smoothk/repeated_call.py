"""The checks and choices of the last convolution with a pair of factors, kept for those after it.

On small images they take as long as the convolution. The call is made again, by the same method and with nothing else,
where the input is of the same kind, the factors are as they were, and nobody watches.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, is_in_torch_dispatch_mode

from . import reference
from .factor_cache import state_of
from .geometry import Geometry
from .low_rank_ops import finish, kernel_arguments


def operators_are_recorded() -> bool:
    """Whether this call is exported, traced by `torch.jit`, or counted by `torch.utils.flop_counter.FlopCounterMode`,
    to which an unknown operator is free: they are given the library's operators."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting() or _flops_are_counted()


def _flops_are_counted() -> bool:
    # Its module is loaded where it is used, as it imports Triton: a formula of ours could not be registered earlier.
    counter = "torch.utils.flop_counter"
    if counter not in sys.modules or not is_in_torch_dispatch_mode(include_infra_modes=False):
        return False
    return any(type(mode).__module__ == counter for mode in _get_current_dispatch_mode_stack())


class RepeatedCall:
    """A call on a batch of images, without gradients, that was made by the kernel or as two library convolutions.

    Args:
        input, v, u, bias: of that call.
        method, options: that were asked for.
        geometry: of the call.
        fused: whether the kernel made it.
    """

    def __init__(
        self,
        input: Tensor,
        v: Tensor,
        u: Tensor,
        bias: Tensor | None,
        method: str,
        options: tuple[Any, ...],
        geometry: Geometry,
        fused: bool,
    ) -> None:
        self.u, self.bias = u, bias  # not v: the call is kept for as long as that lives
        self.method, self.options, self.geometry = method, options, geometry
        self.shape, self.stride, self.dtype = input.shape, input.stride(), input.dtype
        self.output_shape = geometry.output
        # The state comes first: what is written to a factor from here on, by another thread, is noticed.
        self.kernel = (state_of(v, u), kernel_arguments(input, v, u, geometry)) if fused else None

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
            and (residual is None or self._takes(residual))
            and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
            and not operators_are_recorded()
            and torch._C._functorch.peek_interpreter_stack() is None
            and forward_ad._current_level < 0
            and (self.kernel is None or state_of(v, u) == self.kernel[0])
        )

    def _takes(self, residual: Tensor) -> bool:
        same = residual.shape == self.output_shape and residual.dtype is self.dtype
        return type(residual) is Tensor and same and residual.is_cpu

    def __call__(self, input: Tensor, v: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        if self.kernel is None:
            g = self.geometry
            options = g.stride, g.padding, g.dilation, g.groups, g.scheme
            return finish(reference.low_rank_conv(input, v, self.u, self.bias, *options), residual, relu)
        _, (packed, numbers, channels_last) = self.kernel
        op = torch.ops.smoothk.low_rank_conv_fused
        return op(input, packed, self.bias, residual, numbers, relu, channels_last, False)[0]
