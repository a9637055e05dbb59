"""The low-rank convolution as an operator that torch.compile does not look into: schema, kernel, fake kernel, autograd.

Which method runs is decided when the operator does, so that one compiled graph serves every batch size.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from . import low_rank_cost, reference
from .factor_cache import cached
from .geometry import Geometry, channels_last, geometry_of

NAME = "smoothk_torch::low_rank_conv"


def compute(
    input: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    method: str,
    relu: bool = False,
    with_z: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``y = relu(u * z + bias + residual)`` and, if asked for, ``z = v * input``, by ``method``; with no gradient.

    Args:
        input: with a batch axis.
        v, u: of any dtype that the kernel takes; the fused method rounds them to float32 only.
        bias, residual: of the input's dtype, or None.
        geometry: of the call, ``padding`` as numbers where ``with_z``.
    """
    if method == "auto":
        method = low_rank_cost.fastest(geometry.flat, input.dtype, with_z)
    if method == "fused" and geometry.fits_kernel and (not input.is_cuda or cuda_takes(geometry, input, with_z)):
        return _fused(input, v, u, bias, residual, geometry, relu, with_z)
    options = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    z = None
    if method == "merged" and not with_z:
        y = reference.merged_conv(input, _merged_weight(v, u, geometry).to(input.dtype), bias, *options)
    else:
        v, u = v.to(input.dtype), u.to(input.dtype)
        if with_z:
            first, second = _stages(geometry)
            z = torch.convolution(input, v, None, *first)
            y = torch.convolution(z, u, bias, *second)
        else:
            y = reference.low_rank_conv(input, v, u, bias, *options, geometry.scheme)
    return finish(y, residual, relu), z


def cuda_takes(geometry: Geometry, input: Tensor, with_z: bool, dtype: torch.dtype | None = None) -> bool:
    """Whether the CUDA kernel runs a call on the device of ``input``: what it is made for, and a tile that fits there.

    ``dtype`` is that of the call where it is not the input's.
    """
    device = torch.cuda.get_device_properties(input.device)
    shared_memory = device.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's stub lacks it
    numbers = device.multi_processor_count, shared_memory
    return _cuda_takes(geometry.flat, dtype or input.dtype, with_z, numbers)


@lru_cache(maxsize=4096)
def _cuda_takes(geometry: Geometry, dtype: torch.dtype, with_z: bool, device: tuple[int, int]) -> bool:
    if 0 in geometry.output:  # nothing is launched
        return True
    sizes = geometry.v, geometry.u, geometry.input, geometry.stride, geometry.leading_padding(), geometry.dilation
    options = geometry.output[2:], geometry.groups, str(dtype).removeprefix("torch."), with_z
    return importlib.import_module("smoothk._C_cuda").low_rank_conv_blocks(*sizes, *options, *device) > 0


def finish(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """``relu(y + residual)``, as far as asked for."""
    if residual is not None:
        y = y + residual
    return y.relu() if relu else y


def _merged_weight(v: Tensor, u: Tensor, geometry: Geometry) -> Tensor:
    scheme, groups = geometry.scheme, geometry.groups
    return cached(("merged", groups, scheme), v, u, lambda: reference.merged_weight(v, u, groups, scheme))


def _fused(
    input: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    relu: bool,
    with_z: bool,
) -> tuple[Tensor, Tensor | None]:
    packed, numbers, last = kernel_arguments(input, v, u, geometry)
    residual = None if residual is None else _as_images(residual)
    op = torch.ops.smoothk.low_rank_conv_fused
    y, z = op(_as_images(input), packed, bias, residual, numbers, relu, last, with_z)
    return _from_images(y, geometry.axes), _from_images(z, geometry.axes) if with_z else None


def kernel_arguments(input: Tensor, v: Tensor, u: Tensor, geometry: Geometry) -> tuple[Tensor, tuple[int, ...], bool]:
    """Packed factors, sizes and options of the kernel's operator, and whether it answers in channels last."""
    flat = geometry.flat

    def pack() -> Tensor:
        return torch.ops.smoothk.low_rank_conv_pack(v.detach().reshape(flat.v), u.detach().reshape(flat.u), flat.groups)

    packed = cached(("packed", flat.groups), v, u, pack)
    return packed, flat.kernel_numbers, geometry.axes == 0 or channels_last(input, v)


def _as_images(tensor: Tensor) -> Tensor:
    """``[N, C, L]`` or ``[rows, C]`` as a batch of images ``[N, C, H, W]``, a view."""
    if tensor.dim() == 4:
        return tensor
    return tensor.unsqueeze(2) if tensor.dim() == 3 else tensor.t()[None, :, None, :]


def _from_images(images: Tensor, axes: int) -> Tensor:
    """Inverse of `_as_images`."""
    if axes == 2:
        return images
    return images.squeeze(2) if axes == 1 else images[0, :, 0, :].t()


def _stages(geometry: Geometry) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Stride, padding, dilation and so on of the two library convolutions, as `torch.convolution` takes them."""
    ones, zeros = (1,) * geometry.axes, (0,) * geometry.axes
    rest = False, zeros, geometry.groups  # not transposed, no output padding
    stride, padding, dilation = geometry.stride, geometry.padding, geometry.dilation
    if geometry.scheme == "channel":
        return (stride, padding, dilation, *rest), (ones, zeros, ones, *rest)
    return (
        ((stride[0], 1), (padding[0], 0), (dilation[0], 1), *rest),
        ((1, stride[1]), (0, padding[1]), (1, dilation[1]), *rest),
    )


def _geometry(input: Tensor, v: Tensor, u: Tensor, *options: Any) -> Geometry:
    return geometry_of(v.dim() - 2, input.shape, v.shape, u.shape, None, *options)


def _memory_format(input: Tensor, v: Tensor) -> torch.memory_format:
    return torch.channels_last if channels_last(input, v) else torch.contiguous_format


def _kernel(
    input: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    method: str,
    relu: bool,
    with_z: bool,
) -> tuple[Tensor, Tensor]:
    geometry = _geometry(input, v, u, stride, padding, dilation, groups)
    y, z = compute(input, v, u, bias, residual, geometry, method, relu, with_z)
    memory_format = _memory_format(input, v)
    z = input.new_empty(0) if z is None else z.contiguous(memory_format=memory_format)
    return y.contiguous(memory_format=memory_format), z


def _fake(input: Tensor, v: Tensor, u: Tensor, bias: Any, residual: Any, *options: Any) -> tuple[Tensor, Tensor]:
    *numbers, _, _, with_z = options
    geometry, memory_format = _geometry(input, v, u, *numbers), _memory_format(input, v)
    z_size: tuple[int, ...] = (0,)
    if with_z:
        size = list(geometry.output[2:])
        if geometry.scheme == "spatial":
            size[1] = geometry.input[3]
        z_size = (geometry.output[0], v.shape[0], *size)
    y, z = (input.new_empty(size) for size in (geometry.output, z_size))
    return y.contiguous(memory_format=memory_format), z.contiguous(memory_format=memory_format) if with_z else z


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, v, u, bias, residual, *numbers, _, relu, with_z = inputs
    if relu or residual is not None or not with_z:
        raise RuntimeError("low_rank_conv has a derivative with with_z, and without residual and ReLU")
    ctx.geometry, ctx.bias_sizes = _geometry(input, v, u, *numbers), None if bias is None else list(bias.shape)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, v, u, output[1])


def _backward(ctx: Any, grad_y: Tensor | None, grad_z: Tensor | None) -> tuple[Any, ...]:
    """Those of the two convolutions, by the library: they are differentiable themselves."""
    input, v, u, z = ctx.saved_tensors
    first, second = _stages(ctx.geometry)
    needs_input, needs_v, needs_u, needs_bias, *_ = ctx.needs_input_grad
    grad_input = grad_v = grad_u = grad_bias = None
    back = torch.ops.aten.convolution_backward
    if grad_y is not None:
        through = needs_input or needs_v
        from_y, grad_u, grad_bias = back(grad_y, z, u, ctx.bias_sizes, *second, [through, needs_u, needs_bias])
        if through:
            grad_z = from_y if grad_z is None else grad_z + from_y
    if grad_z is not None and (needs_input or needs_v):
        grad_input, grad_v, _ = back(grad_z, input, v, None, *first, [needs_input, needs_v, False])
    return grad_input, grad_v, grad_u, grad_bias, *(None for _ in range(8))


def register() -> None:
    """Define the operator; once, when a kernel is first there for it to run."""
    torch.library.define(
        NAME,
        "(Tensor input, Tensor v, Tensor u, Tensor? bias, Tensor? residual, SymInt[] stride, SymInt[] padding, "
        "SymInt[] dilation, int groups, str method, bool relu, bool with_z) -> (Tensor, Tensor)",
    )
    torch.library.impl(NAME, "default", _kernel)
    register_fake(NAME, _fake)
    register_autograd(NAME, _backward, setup_context=_save)
