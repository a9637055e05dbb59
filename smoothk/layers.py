"""Low-rank layers: drop-in replacements of `torch.nn` convolutions and linear layers.

The weight of a layer is the product of two factors, ``v`` (applied first) and ``u``; see `smoothk.low_rank_conv2d` for
their shapes. The factors of a given weight come from its truncated SVD, the best approximation of that rank (Eckart &
Young, 1936), with ``sqrt(σ)`` in each factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .dense_layers import check_finite, check_forward
from .factor_cache import forget
from .low_rank_conv import check_method, low_rank_conv, low_rank_linear
from .reference import merged_weight
from .svd import check_rank, choose_rank, truncated_factors
from .unfolding import check_unfolding

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
fx.wrap("low_rank_conv")  # calls that torch.fx records and does not look into
fx.wrap("low_rank_linear")


class _Placement(TypedDict):
    device: torch.device | str | None
    dtype: torch.dtype | None


class _LowRank(nn.Module):
    """What the convolutions and the linear layer share: the parameters v, u and bias, and the product of the
    factors."""

    rank: int
    v: nn.Parameter
    u: nn.Parameter
    bias: nn.Parameter | None
    _method = "auto"

    @property
    def weight(self) -> Tensor:
        """The dense weight, the product of the factors; differentiable."""
        raise NotImplementedError

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of `weight`, known without computing it."""
        raise NotImplementedError

    def to_sequential(self) -> nn.Sequential:
        """The pair of torch layers, v's then u's, that computes the same."""
        raise NotImplementedError

    @property
    def method(self) -> str:
        """How the layer is computed: ``"auto"`` (default), ``"fused"``, ``"pair"`` or ``"merged"``; see
        `smoothk.low_rank_conv2d`. `smoothk.tune` sets it."""
        return self._method

    @method.setter
    def method(self, method: str) -> None:
        self._method = check_method(method)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        forget(self.v)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        forget(self.v)
        super()._load_from_state_dict(*args, **options)

    def _adopt(self, dense: Conv | nn.Linear, v: Tensor, u: Tensor) -> None:
        """Take the factors of ``dense``'s weight and its bias, mode and flags; no tensor is shared with it."""
        with torch.no_grad():
            self.v.copy_(v)
            self.u.copy_(u)
            if dense.bias is not None:
                _present(self.bias).copy_(dense.bias)
        self._adopt_flags(dense)

    def _adopt_flags(self, dense: Conv | nn.Linear) -> None:
        for factor in (self.v, self.u):
            factor.requires_grad_(dense.weight.requires_grad)
        if dense.bias is not None:
            _present(self.bias).requires_grad_(dense.bias.requires_grad)
        self.train(dense.training)

    def _reset(self, fan_in: int, fan_in_v: int, fan_in_u: int) -> None:
        """Initialise so that the product has the variance 1/(3·fan_in) of torch's default dense weight."""
        nn.init.uniform_(self.v, -math.sqrt(3 / fan_in_v), math.sqrt(3 / fan_in_v))
        nn.init.uniform_(self.u, -1 / math.sqrt(fan_in_u), 1 / math.sqrt(fan_in_u))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def _give(self, dense: Conv | nn.Linear) -> None:
        """Inverse of `_adopt`: the product, the bias, mode and flags go to ``dense``."""
        with torch.no_grad():
            dense.weight.copy_(self.weight)
            if self.bias is not None:
                _present(dense.bias).copy_(self.bias)
        dense.weight.requires_grad_(self.v.requires_grad or self.u.requires_grad)
        if self.bias is not None:
            _present(dense.bias).requires_grad_(self.bias.requires_grad)
        dense.train(self.training)

    def _in_sequence(self, v: Conv | nn.Linear, u: Conv | nn.Linear) -> nn.Sequential:
        """Torch's layers ``v`` and ``u`` one after the other, with the values of the factors."""
        with torch.no_grad():
            v.weight.copy_(self.v)
            u.weight.copy_(self.u)
            if self.bias is not None:
                _present(u.bias).copy_(self.bias).requires_grad_(self.bias.requires_grad)
        v.weight.requires_grad_(self.v.requires_grad)
        u.weight.requires_grad_(self.u.requires_grad)
        return nn.Sequential(v, u).train(self.training)


def _present(bias: Tensor | None) -> Tensor:
    """The bias of a layer that was made with one because its counterpart has one."""
    assert bias is not None
    return bias


class _LowRankConvNd(_LowRank):
    axes: int
    transposed = False
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        rank: int,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        scheme: str = "channel",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_unfolding(scheme, "scheme")
        if scheme == "spatial" and self.axes != 2:
            raise ValueError(f"scheme must be 'channel' for a {self.axes}d convolution, got 'spatial'")
        # torch's own layer checks and normalises the geometry; on meta it allocates nothing.
        kind: Callable[..., Conv] = _DENSE[self.axes]
        dense = kind(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device="meta"
        )
        check_rank(rank, dense.weight.shape, groups, scheme)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            setattr(self, name, getattr(dense, name))
        self.padding_mode, self.output_padding = dense.padding_mode, dense.output_padding
        self._pad = list(dense._reversed_padding_repeated_twice)
        self.rank, self.scheme = rank, scheme
        kernel_v, kernel_u = self.kernel_size, (1,) * self.axes
        if scheme == "spatial":
            kernel_v, kernel_u = (self.kernel_size[0], 1), (1, self.kernel_size[1])
        options: _Placement = {"device": device, "dtype": dtype}
        self.v = nn.Parameter(torch.empty(groups * rank, in_channels // groups, *kernel_v, **options))
        self.u = nn.Parameter(torch.empty(out_channels, rank, *kernel_u, **options))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, **options))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the factors and the bias as a dense layer of the same geometry would be, in variance."""
        fan_in = self.in_channels // self.groups * math.prod(self.kernel_size)
        self._reset(fan_in, math.prod(self.v.shape[1:]), math.prod(self.u.shape[1:]))

    @classmethod
    def from_conv(
        cls,
        conv: Conv,
        rank: int | None = None,
        *,
        energy: float | None = None,
        keep: float | None = None,
        scheme: str = "channel",
    ) -> _LowRankConvNd:
        """Factorise a convolution by truncated SVD, one per group.

        Args:
            conv: the layer; it is left untouched and shares nothing with the result.
            rank: rank per group; or
            energy: smallest rank whose share of ``Σσ²`` over all groups reaches this, in (0, 1]; or
            keep: largest rank whose factors have at most this share of the weight's parameters, in (0, 1].
            scheme: ``"channel"`` or, in 2-d, ``"spatial"``.

        Returns:
            The layer, with the dtype, device, mode and ``requires_grad`` of ``conv``. At full rank it reproduces
            ``conv`` to rounding.

        Raises:
            TypeError: ``conv`` is not this dimension's torch convolution; not exactly one of rank, energy and keep.
            ValueError: one of them is out of range; unknown scheme; a weight with NaN or Inf.
        """
        dense = _DENSE[cls.axes]
        if not isinstance(conv, dense) or isinstance(conv, nn.modules.lazy.LazyModuleMixin):
            raise TypeError(f"conv must be an initialised torch.nn.{dense.__name__}, got {type(conv).__name__}")
        check_unfolding(scheme, "scheme")
        check_forward("conv", conv, dense)
        check_finite(conv.weight)
        rank = choose_rank(conv.weight, rank, energy, keep, conv.groups, scheme)
        layer = cls._like(conv, rank, scheme)
        u, v = truncated_factors(conv.weight, rank, conv.groups, scheme)
        layer._adopt(conv, v.reshape(layer.v.shape), layer._u_from_matrices(u))
        return layer

    @classmethod
    def _like(cls, conv: Conv, rank: int, scheme: str) -> _LowRankConvNd:
        """A layer of the geometry, dtype and device of ``conv``, its values not set."""
        layer = torch.nn.utils.skip_init(
            cls,
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            rank,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            scheme,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        layer._pad = list(conv._reversed_padding_repeated_twice)  # which may be another than ``padding`` says
        return layer

    def to_conv(self) -> Conv:
        """The dense layer with the product of the factors as its weight."""
        conv = torch.nn.utils.skip_init(
            _DENSE[self.axes],
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            device=self.v.device,
            dtype=self.v.dtype,
        )
        conv._reversed_padding_repeated_twice = list(self._pad)
        self._give(conv)
        return conv

    def to_sequential(self) -> nn.Sequential:
        """The pair of torch convolutions, v's then u's, that computes the same."""
        conv = _DENSE[self.axes]
        options = {"groups": self.groups, "device": self.v.device, "dtype": self.v.dtype}
        if self.scheme == "channel":
            first: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
            second: dict[str, Any] = {}
        else:
            first, second = (
                {"stride": s, "dilation": d} for s, d in zip(*map(_split, (self.stride, self.dilation)), strict=True)
            )
            pad = (self.padding,) * 2 if isinstance(self.padding, str) else _split(self.padding, 0)
            first["padding"], second["padding"] = pad
            second["padding_mode"] = self.padding_mode
        first["padding_mode"] = self.padding_mode
        hidden = self.v.shape[0]
        v = torch.nn.utils.skip_init(
            conv, self.in_channels, hidden, tuple(self.v.shape[2:]), bias=False, **first, **options
        )
        u = torch.nn.utils.skip_init(
            conv, hidden, self.out_channels, tuple(self.u.shape[2:]), bias=self.bias is not None, **second, **options
        )
        return self._in_sequence(v, u)

    @property
    def weight(self) -> Tensor:
        """The dense weight ``[C_out, C_in/groups, *kernel]``, the product of the factors; differentiable."""
        return merged_weight(self.v, self.u, self.groups, self.scheme)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of `weight`, known without computing it."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def _u_from_matrices(self, u: Tensor) -> Tensor:
        """u from ``[groups, rows, rank]``, the rows of the unfolded weight."""
        if self.scheme == "channel":
            return u.reshape(self.u.shape)
        grouped = u.reshape(self.groups, -1, self.kernel_size[1], self.rank)
        return grouped.transpose(2, 3).reshape(self.u.shape)

    def forward(self, input: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """``[N, C_in, *size]`` to ``[N, C_out, *size_out]``, as the dense layer with weight `weight`; then ``residual``
        added and ReLU applied, as far as asked for, in one pass where there is a kernel."""
        padding: int | tuple[int, ...] | str = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._pad, mode=self.padding_mode), 0
        method, factors = self._method, (self.v, self.u, self.bias)
        return low_rank_conv(
            self.axes,
            input,
            *factors,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            method,
            residual=residual,
            relu=relu,
        )

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}"
        text += f", scheme={self.scheme!r}, stride={self.stride}"
        ones, zeros = (1,) * self.axes, (0,) * self.axes
        if self.padding != zeros:
            text += f", padding={self.padding}"
        if self.dilation != ones:
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode!r}"
        return text


def _split(value: Sequence[int], rest: int = 1) -> tuple[tuple[int, int], tuple[int, int]]:
    """The vertical and the horizontal half of a per-axis option."""
    return (value[0], rest), (rest, value[1])


class LowRankConv1d(_LowRankConvNd):
    """`torch.nn.Conv1d` with a factorised weight: v ``[groups·rank, C_in/groups, k]``, u ``[C_out, rank, 1]``.

    Arguments as in `LowRankConv2d`; the channel scheme only.
    """

    axes = 1


class LowRankConv2d(_LowRankConvNd):
    """`torch.nn.Conv2d` with a factorised weight.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as in `torch.nn.Conv2d`.
        rank: rank per group, from 1 to the full rank: ``min(C_out/g, C_in/g·k_h·k_w)`` in the channel scheme,
            ``min(C_out/g·k_w, C_in/g·k_h)`` in the spatial one.
        scheme: ``"channel"`` or ``"spatial"``; the shapes of ``v`` and ``u`` are those of `smoothk.low_rank_conv2d`.

    Raises:
        ValueError: rank out of range, unknown scheme, or a geometry that `torch.nn.Conv2d` refuses.

    Input ``[N, C_in, H, W]`` or ``[C_in, H, W]``, output as from `torch.nn.Conv2d`. The parameters are ``v``, ``u`` and
    ``bias``; ``weight`` is their product.
    """

    axes = 2


class LowRankConv3d(_LowRankConvNd):
    """`torch.nn.Conv3d` with a factorised weight: v ``[groups·rank, C_in/groups, k_d, k_h, k_w]``, u ``[C_out, rank,
    1, 1, 1]``.

    Arguments as in `LowRankConv2d`; the channel scheme only.
    """

    axes = 3


_DENSE: dict[int, type[Conv]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_FACTORIZED: dict[int, type[_LowRankConvNd]] = {1: LowRankConv1d, 2: LowRankConv2d, 3: LowRankConv3d}


class LowRankLinear(_LowRank):
    """`torch.nn.Linear` with a factorised weight: v ``[rank, in_features]``, u ``[out_features, rank]``.

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`.
        rank: from 1 to ``min(in_features, out_features)``.

    Raises:
        ValueError: rank out of range.

    Input ``[..., in_features]``, output ``[..., out_features]``. The parameters are ``v``, ``u`` and ``bias``;
    ``weight`` is the product ``u @ v``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rank(rank, (out_features, in_features))
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        options: _Placement = {"device": device, "dtype": dtype}
        self.v = nn.Parameter(torch.empty(rank, in_features, **options))
        self.u = nn.Parameter(torch.empty(out_features, rank, **options))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, **options))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the factors and the bias as a dense layer of the same size would be, in variance."""
        self._reset(self.in_features, self.in_features, self.rank)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, rank: int | None = None, *, energy: float | None = None, keep: float | None = None
    ) -> LowRankLinear:
        """Factorise a linear layer by truncated SVD; arguments, result and errors as in `LowRankConv2d.from_conv`."""
        if not isinstance(linear, nn.Linear) or isinstance(linear, nn.modules.lazy.LazyModuleMixin):
            raise TypeError(f"linear must be an initialised torch.nn.Linear, got {type(linear).__name__}")
        check_forward("linear", linear, nn.Linear)
        check_finite(linear.weight)
        rank = choose_rank(linear.weight, rank, energy, keep, 1, "channel")
        layer = cls._like(linear, rank, "channel")
        u, v = truncated_factors(linear.weight, rank)
        layer._adopt(linear, v[0], u[0])
        return layer

    @classmethod
    def _like(cls, linear: nn.Linear, rank: int, scheme: str) -> LowRankLinear:
        """A layer of the size, dtype and device of ``linear``, its values not set; there is one scheme."""
        options = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        return torch.nn.utils.skip_init(
            cls, linear.in_features, linear.out_features, rank, linear.bias is not None, **options
        )

    def to_linear(self) -> nn.Linear:
        """The dense layer with the product of the factors as its weight."""
        linear = torch.nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.v.device,
            dtype=self.v.dtype,
        )
        self._give(linear)
        return linear

    def to_sequential(self) -> nn.Sequential:
        """The pair of torch linear layers, v's then u's, that computes the same."""
        options = {"device": self.v.device, "dtype": self.v.dtype}
        v = torch.nn.utils.skip_init(nn.Linear, self.in_features, self.rank, False, **options)
        u = torch.nn.utils.skip_init(nn.Linear, self.rank, self.out_features, self.bias is not None, **options)
        return self._in_sequence(v, u)

    @property
    def weight(self) -> Tensor:
        """The dense weight ``[out_features, in_features]``, the product of the factors; differentiable."""
        return self.u @ self.v

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of `weight`, known without computing it."""
        return (self.out_features, self.in_features)

    def forward(self, input: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``; then ``residual`` added and ReLU applied, as far as asked
        for, in one pass where there is a kernel."""
        return low_rank_linear(input, self.v, self.u, self.bias, self.method, residual=residual, relu=relu)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )
