"""Shapes and options of a low-rank convolution, checked once per combination."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Sizes = tuple[int, ...]
_MOST_COPIED = 1 << 26  # entries, of float32 in the kernel


@dataclass(frozen=True, eq=False)
class Geometry:
    """A call without its tensors' values. Equal calls share one, so that it can be a key by its identity.

    Attributes:
        scheme: ``"channel"`` or ``"spatial"``, spelled by the shapes of the factors.
        input, v, u, output: shapes; input and output with a batch axis.
        stride, dilation: per axis.
        padding: per axis, ``"same"`` or ``"valid"``.
        groups: of both convolutions.
    """

    scheme: str
    input: Sizes
    v: Sizes
    u: Sizes
    output: Sizes
    stride: Sizes
    padding: Sizes | str
    dilation: Sizes
    groups: int

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return len(self.stride)

    @property
    def kernel(self) -> Sizes:
        """Of the dense convolution that this is a factorisation of."""
        return (self.v[2], self.u[3]) if self.scheme == "spatial" else self.v[2:]

    @cached_property
    def flat(self) -> Geometry:
        """The same of two axes: one axis becomes ``[1, size]``, the rows of a linear map become the columns of one
        image."""
        return self if self.axes == 2 else _as_2d(self)

    @cached_property
    def kernel_numbers(self) -> Sizes:
        """Of two axes, the numbers that the kernel's operator takes: sizes of v and u, groups, stride, padding,
        dilation and output size."""
        options = (*self.stride, *self.leading_padding(), *self.dilation)
        return (*self.v, *self.u, self.groups, *options, *self.output[2:])

    @cached_property
    def fits_kernel(self) -> bool:
        """Whether what one row of the output reads, with its padding, is small enough to be copied. Far dilation in a
        padding as wide reads a few entries and mostly zeros."""
        flat = self.flat
        reach = flat.dilation[0] * (flat.kernel[0] - 1) + 1
        width = flat.input[3] + (flat.total_padding()[1] if flat.scheme == "channel" else 0)
        return flat.v[1] * reach * width <= _MOST_COPIED

    def leading_padding(self) -> Sizes:
        """Zeros before the first entry of every axis; torch puts the odd one of ``"same"`` behind the last."""
        return tuple(total // 2 for total in self.total_padding())

    def total_padding(self) -> Sizes:
        """Zeros that every axis gets, both sides together."""
        if self.padding == "same":
            return tuple(d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))
        return (0,) * self.axes if isinstance(self.padding, str) else tuple(2 * p for p in self.padding)


def geometry_of(
    axes: int,
    input: Sequence[int],
    v: Sequence[int],
    u: Sequence[int],
    bias: Sequence[int] | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
) -> Geometry:
    """The geometry of a call whose tensors have these shapes; raises TypeError or ValueError that names what is
    wrong."""
    if not isinstance(groups, int):
        raise TypeError(f"groups must be an int, got {type(groups).__name__}")
    options = _hashable(stride), _hashable(padding), _hashable(dilation), groups
    if torch.compiler.is_compiling() or any(isinstance(size, torch.SymInt) for size in input):
        return _check(axes, tuple(input), tuple(v), tuple(u), None if bias is None else tuple(bias), *options)
    return _check_once(axes, input, v, u, bias, *options)


def _hashable(option: Any) -> Any:
    if type(option) in (int, tuple, str):  # the usual ones, without the slower questions
        return option
    return tuple(option) if isinstance(option, Iterable) and not isinstance(option, str) else option


def _check(
    axes: int,
    input: Sizes,
    v: Sizes,
    u: Sizes,
    bias: Sizes | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Geometry:
    for name, shape in (("v", v), ("u", u)):
        if len(shape) != axes + 2:
            raise ValueError(f"{name} must have {axes + 2} dimensions for a {axes}d convolution, got {list(shape)}")
        if 0 in shape:
            raise ValueError(f"{name} must not be empty, got {list(shape)}")
    if len(input) not in (axes + 1, axes + 2):
        raise ValueError(f"input must have {axes + 1} or {axes + 2} dimensions, got {list(input)}")
    if groups < 1:
        raise ValueError(f"groups must be a positive int, got {groups!r}")
    if v[0] != groups * u[1]:
        raise ValueError(f"v must have groups*r = {groups}*{u[1]} rows to match u {list(u)}, got v {list(v)}")
    if u[0] % groups:
        raise ValueError(f"u must have a multiple of groups={groups} rows, got u {list(u)}")
    if input[-axes - 1] != groups * v[1]:
        raise ValueError(
            f"input must have groups*C_in/groups = {groups * v[1]} channels to match v {list(v)}, "
            f"got input {list(input)}"
        )
    if bias is not None and bias != u[:1]:
        raise ValueError(f"bias must have shape [{u[0]}], got {list(bias)}")
    strides = _per_axis(stride, "stride", axes, 1)
    dilations = _per_axis(dilation, "dilation", axes, 1)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding must be 'same', 'valid', an int or {axes} ints, got {padding!r}")
        if padding == "same" and max(strides) > 1:
            raise ValueError(f"padding 'same' needs stride 1, got stride {stride!r}")
        paddings: Sizes | str = padding
    else:
        paddings = _per_axis(padding, "padding", axes, 0)
    batched = (1, *input) if len(input) == axes + 1 else input
    geometry = Geometry(_scheme_of(v, u), batched, v, u, (), strides, paddings, dilations, groups)
    padded = [size + total for size, total in zip(batched[2:], geometry.total_padding(), strict=True)]
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, geometry.kernel, strict=True)]
    if any(size < least for size, least in zip(padded, reach, strict=True)):
        raise ValueError(
            f"input must be at least as large as the kernel: padded it has size {padded}, and the kernel "
            f"{list(geometry.kernel)} with dilation {list(dilations)} spans {reach}"
        )
    sizes = ((size - least) // s + 1 for size, least, s in zip(padded, reach, strides, strict=True))
    output = (batched[0], u[0], *sizes)
    return Geometry(geometry.scheme, batched, v, u, output, strides, paddings, dilations, groups)


_check_once = lru_cache(maxsize=4096, typed=True)(_check)  # stride 1.0 is refused, whether 1 came before or not


def _per_axis(value: Any, name: str, axes: int, least: int) -> Sizes:
    """``value`` as one integer per spatial axis."""
    values = value if isinstance(value, tuple) else (value,) * axes
    if any(not isinstance(v, int) or isinstance(v, bool) for v in values):
        raise TypeError(f"{name} must be an int or {axes} ints, got {value!r}")
    if len(values) != axes or any(v < least for v in values):
        raise ValueError(f"{name} must be an int or {axes} ints, each at least {least}, got {value!r}")
    return values


def _scheme_of(v: Sizes, u: Sizes) -> str:
    """The scheme that the shapes of the factors spell; where both readings hold they give the same result."""
    if all(size == 1 for size in u[2:]):
        return "channel"
    if len(v) == 4 and v[3] == 1 and u[2] == 1:
        return "spatial"
    raise ValueError(
        "u must be [C_out, r, 1, ...] (channel scheme), or [C_out, r, 1, k_w] with v [groups*r, C_in/groups, k_h, 1] "
        f"(spatial scheme), got u {list(u)} and v {list(v)}"
    )


def _as_2d(geometry: Geometry) -> Geometry:
    def image(shape: Sizes) -> Sizes:
        return (shape[0], shape[1], 1, shape[2]) if geometry.axes else (1, shape[1], 1, shape[0])

    def factor(shape: Sizes) -> Sizes:
        return (*shape[:2], 1, *(shape[2:] or (1,)))

    ones, zeros = (1,) * (2 - geometry.axes), (0,) * (2 - geometry.axes)
    padding = geometry.padding if isinstance(geometry.padding, str) else (*zeros, *geometry.padding)
    return replace(
        geometry,
        input=image(geometry.input),
        v=factor(geometry.v),
        u=factor(geometry.u),
        output=image(geometry.output),
        stride=(*ones, *geometry.stride),
        padding=padding,
        dilation=(*ones, *geometry.dilation),
    )


def with_explicit_padding(input: Tensor, geometry: Geometry) -> tuple[Tensor, Geometry]:
    """The same call with ``padding`` as numbers; ``input`` is padded ahead where the two sides of an axis differ."""
    total = geometry.total_padding()
    if any(t % 2 for t in total):
        after = [t % 2 for t in total]
        input = F.pad(input, [p for t in reversed(after) for p in (0, t)])
        geometry = replace(geometry, input=tuple(input.shape))
    return input, replace(geometry, padding=geometry.leading_padding())


def channels_last(*tensors: Tensor) -> bool:
    """Whether torch's convolution of these (the image, the weight) answers in channels last."""
    return any(
        t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in tensors
    )
