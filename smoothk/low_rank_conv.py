"""Convolutions and linear maps with a factorised weight: check the arguments, choose a method, run.

Methods, all with the same result:

- ``"fused"``: smoothk's kernel, which keeps the intermediate in cache;
- ``"pair"``: two library convolutions, the definition;
- ``"merged"``: one library convolution with the product of the factors;
- ``"auto"``: the fastest of them for this geometry (`smoothk.low_rank_cost`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backend as _backend
from . import low_rank_cost, reference
from .factor_cache import keep, kept
from .geometry import Geometry, geometry_of, with_explicit_padding
from .low_rank_ops import compute, cuda_takes, finish
from .repeated_call import RepeatedCall, operators_are_recorded

METHODS = ("auto", "fused", "pair", "merged")
_OP = "low_rank_conv"
_KEPT = (int, tuple, str)


def check_method(method: object) -> str:
    """``method`` if it is one, else ValueError."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    return method


def low_rank_conv(
    axes: int,
    input: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    method: str = "auto",
    backend: str | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """`low_rank_conv2d` in ``axes`` dimensions, then ``residual`` added, then ReLU."""
    options = stride, padding, dilation, groups
    repeatable = axes == 2 and backend is None and isinstance(v, Tensor) and not torch.compiler.is_compiling()
    # A list could be written to between two calls.
    repeatable = repeatable and type(stride) in _KEPT and type(padding) in _KEPT and type(dilation) in _KEPT
    call = kept(v, RepeatedCall) if repeatable else None
    if call is not None and call.fits(input, v, u, bias, method, options, residual):
        return call(input, v, residual, relu)
    _check_tensors(input, v, u, bias)
    bias_shape = None if bias is None else bias.shape
    geometry = geometry_of(axes, input.shape, v.shape, u.shape, bias_shape, *options)
    batched = input.dim() == axes + 2
    if not batched:
        input, residual = input.unsqueeze(0), None if residual is None else residual.unsqueeze(0)
    differentiable = _differentiable(input, v, u, bias, residual)
    chosen = _choose((input, v, u, bias), geometry, check_method(method), backend, differentiable)
    y = _run(input, v, u, bias, residual, geometry, chosen, relu, differentiable)
    if repeatable and batched and _can_be_kept(chosen, geometry, input, v, u, bias):
        call = RepeatedCall(input, v, u, bias, method, options, geometry, chosen == "fused")
        keep(v, RepeatedCall, call)
    return y if batched else y.squeeze(0)


def _can_be_kept(chosen: str, geometry: Geometry, input: Tensor, v: Tensor, u: Tensor, bias: Tensor | None) -> bool:
    """Whether `RepeatedCall` knows this kind of call."""
    if torch.is_grad_enabled() or _autocast_dtype(input) is not None or not input.is_cpu or operators_are_recorded():
        return False
    if chosen == "fused":
        return geometry.fits_kernel and not (v.is_inference() or u.is_inference())  # see factor_cache
    return chosen == "pair" and all(_is_plain(tensor) for tensor in (input, v, u, bias) if tensor is not None)


def low_rank_linear(
    input: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None,
    method: str = "auto",
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """``relu(input vᵀ uᵀ + bias + residual)``: ``[..., in_features]`` to ``[..., out_features]``.

    The factors are v ``[r, in_features]`` and u ``[out_features, r]``.
    """
    if input.dim() == 0 or input.shape[-1] != v.shape[1]:
        raise ValueError(f"input must have {v.shape[1]} features in its last dimension, got {list(input.shape)}")
    _check_tensors(input, v, u, bias)
    rows = input.reshape(-1, input.shape[-1]) if input.dim() != 2 else input
    geometry = geometry_of(0, rows.shape, v.shape, u.shape, None if bias is None else bias.shape, (), (), (), 1)
    if residual is not None:
        if residual.shape != (*input.shape[:-1], u.shape[0]):  # broadcast
            return finish(low_rank_linear(input, v, u, bias, method), residual, relu)
        residual = residual.reshape(-1, u.shape[0])
    differentiable = _differentiable(rows, v, u, bias, residual)
    chosen = _choose((rows, v, u, bias), geometry, check_method(method), None, differentiable)
    y = _run(rows, v, u, bias, residual, geometry, chosen, relu, differentiable)
    return y if input.dim() == 2 else y.reshape(*input.shape[:-1], y.shape[-1])


def _check_tensors(input: Tensor, v: Tensor, u: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("input", input), ("v", v), ("u", u), ("bias", bias)):
        if not isinstance(tensor, Tensor) and not (name == "bias" and bias is None):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    for name, tensor in (("v", v), ("u", u)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a real floating-point dtype, got {tensor.dtype}")
    same = input.dtype == v.dtype == u.dtype and (bias is None or bias.dtype == v.dtype)
    if not same and not _has_autocast(input.device.type):
        dtypes = {tensor.dtype for tensor in (input, v, u, bias) if tensor is not None}
        names = ", ".join(sorted(map(str, dtypes)))
        raise TypeError(f"input, v, u and bias must have one dtype outside autocast, got {names}")


def _choose(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    geometry: Geometry,
    method: str,
    backend: str | None,
    differentiable: bool,
) -> str:
    """``"fused"``, ``"pair"`` or ``"merged"``; ``"auto"`` where torch.compile leaves it to the operator."""
    input, v, u, bias = tensors
    if not _kernel_runs(method, backend, geometry, [t for t in (input, v, u, bias) if t is not None], differentiable):
        return "merged" if method == "merged" else "pair"
    if geometry.axes == 0 and (differentiable or method == "auto"):  # the library's two products are as fast
        return "pair"
    if method == "auto" and backend is not None:
        return "fused"
    if method == "auto" and not torch.compiler.is_compiling():
        dtype = _autocast_dtype(input) or input.dtype
        return low_rank_cost.fastest(geometry.flat, dtype, differentiable)
    return method


def _run(
    input: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    method: str,
    relu: bool,
    differentiable: bool,
) -> Tensor:
    compiling = torch.compiler.is_compiling()
    traced = compiling or torch.jit.is_tracing()  # a merged weight that was kept would be a constant
    if method == "pair" or (method == "merged" and (differentiable or traced or not _is_plain(v))):
        return finish(_by_library(input, v, u, bias, geometry, method), residual, relu)
    dtype = _autocast_dtype(input)
    if residual is not None:
        kind = geometry.output, dtype or input.dtype, input.device
        if (residual.shape, residual.dtype, residual.device) != kind:  # broadcast or promoted
            return finish(_run(input, v, u, bias, None, geometry, method, False, differentiable), residual, relu)
    if dtype is not None:
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
    if not (differentiable or compiling):
        return compute(input, v, u, bias, residual, geometry, method, relu)[0]
    if dtype is not None:
        v, u = v.to(dtype), u.to(dtype)
    input, geometry = with_explicit_padding(input, geometry)
    numbers = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    op = torch.ops.smoothk_torch.low_rank_conv
    if not differentiable:
        return op(input, v, u, bias, residual, *numbers, method, relu, False)[0]
    return finish(op(input, v, u, bias, None, *numbers, method, False, True)[0], residual, relu)


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _kernel_runs(
    method: str, backend: str | None, geometry: Geometry, tensors: list[Tensor], differentiable: bool
) -> bool:
    """Whether smoothk's kernel can be used; raises where one is asked for by name and cannot."""
    if backend is None:
        if method in ("pair", "merged") or geometry.axes > 2 or operators_are_recorded():
            return False
    if all(tensor.dtype == tensors[0].dtype for tensor in tensors):
        chosen = {_backend.choose(_OP, backend, tensors)}
    else:  # autocast will see to it
        chosen = {_backend.choose(_OP, backend, [tensor]) for tensor in tensors}
    compiling = torch.compiler.is_compiling()  # of symbolic sizes the operator decides
    taken = compiling or geometry.fits_kernel
    if taken and "cuda" in chosen and not compiling and geometry.axes <= 2:
        taken = cuda_takes(geometry, tensors[0], differentiable, _autocast_dtype(tensors[0]))
    if backend not in (None, "torch"):
        if method in ("pair", "merged"):
            raise ValueError(f"method must be 'auto' or 'fused' with backend {backend!r}, got {method!r}")
        if geometry.axes > 2:
            raise _backend.BackendUnavailable(f"backend {backend!r} cannot run {_OP}: it has no 3-d kernel")
        if not taken:
            raise _backend.BackendUnavailable(f"backend {backend!r} cannot run {_OP}: {_refusal(geometry, backend)}")
    return "torch" not in chosen and taken


def _refusal(geometry: Geometry, backend: str) -> str:
    if not geometry.fits_kernel or backend != "cuda":
        return "its kernel does not reach that far"
    return (
        "its kernel takes ranks up to 128, one group, and input channels in whole 16 bytes, where a tile fits into "
        f"shared memory; got v {list(geometry.v)}, u {list(geometry.u)}, input {list(geometry.input)}, "
        f"groups {geometry.groups}"
    )


def _is_plain(tensor: Tensor) -> bool:
    """Whether its identity can stand for its values: no subclass, no transform's wrapper."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and torch._C._functorch.peek_interpreter_stack() is None


def _has_autocast(device: str) -> bool:
    if device == "cpu":
        return torch.is_autocast_enabled("cpu")
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _autocast_dtype(input: Tensor) -> torch.dtype | None:
    """What autocast makes of ``input``, None where it is off or leaves float64 alone."""
    device = input.device.type
    if not _has_autocast(device) or input.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def _by_library(input: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, geometry: Geometry, method: str) -> Tensor:
    options = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    if method == "merged":
        weight = reference.merged_weight(v, u, geometry.groups, geometry.scheme)
        return reference.merged_conv(input, weight, bias, *options)
    return reference.low_rank_conv(input, v, u, bias, *options, geometry.scheme)


def low_rank_conv1d(
    input: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    method: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """`low_rank_conv2d` in one dimension: v ``[groups·r, C_in/groups, k]``, u ``[C_out, r, 1]`` (channel scheme)."""
    return low_rank_conv(1, input, v, u, bias, stride, padding, dilation, groups, method, backend)


def low_rank_conv2d(
    input: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    method: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """Convolution with a factorised weight, ``y = u * (v * x) + bias``.

    The shapes of the factors give the scheme:

    - channel: v ``[groups·r, C_in/groups, k_h, k_w]``, u ``[C_out, r, 1, 1]``; a k_h x k_w convolution to r channels
      per group, then a 1x1 one. Stride, padding and dilation belong to v.
    - spatial: v ``[groups·r, C_in/groups, k_h, 1]``, u ``[C_out, r, 1, k_w]`` (Jaderberg et al., arXiv 1405.3866); the
      vertical part of stride, padding and dilation belongs to v, the horizontal part to u.

    Args:
        input: ``[N, C_in, H, W]`` or ``[C_in, H, W]``, the factors' dtype and device. The output is in channels last
            where `torch.nn.functional.conv2d`'s would be.
        v, u: the factors, as above.
        bias: ``[C_out]`` or None.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`; ``padding`` may be ``"same"`` or
            ``"valid"``.
        method: ``"fused"`` (smoothk's kernel: float32, bfloat16 or float16 with sums in float32; others fall back to
            the pair), ``"pair"`` (two library convolutions), ``"merged"`` (one, with the product of the factors), or
            ``"auto"``, the fastest for this geometry. Without gradients, what is computed from the factors alone is
            kept until they change.
        backend: ``None``, ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Returns:
        ``[N, C_out, H_out, W_out]`` (or without N), as the dense convolution with the product of the factors.

    Raises:
        ValueError: shapes that do not fit each other, an input smaller than the kernel, an unknown method, or an
            impossible stride, padding, dilation or groups.
        TypeError: factors that are not floating-point; several dtypes outside autocast.
        BackendUnavailable: the backend asked for by name cannot run these tensors.
    """
    return low_rank_conv(2, input, v, u, bias, stride, padding, dilation, groups, method, backend)


def low_rank_conv3d(
    input: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    method: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """`low_rank_conv2d` in three dimensions: v ``[groups·r, C_in/groups, k_d, k_h, k_w]``, u ``[C_out, r, 1, 1,
    1]``."""
    return low_rank_conv(3, input, v, u, bias, stride, padding, dilation, groups, method, backend)
