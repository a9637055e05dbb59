"""Back from low-rank layers to torch's own: one dense layer each, or the pair that computes the same."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .compress import replace_layers
from .copies import deep_copy
from .layers import Conv, LowRankLinear, _LowRank, _LowRankConvNd
from .reference import merged_weight


class FactorPair(nn.Sequential):
    """Torch's layers of v and of u, one after the other, with the ``weight`` and ``bias`` of the layer they stand for.

    `torch.nn.MultiheadAttention` and `torch.nn.TransformerEncoderLayer` read these in place of calling the layer.
    """

    @property
    def weight(self) -> Tensor:
        """The dense weight, the product of the factors; of quantised ones, what they stand for."""
        first: Any = self[0]
        second: Any = self[1]
        v, u = _value(first.weight), _value(second.weight)
        if v.dim() == 2:
            return u @ v
        return merged_weight(v, u, second.groups, "spatial" if u.dim() == 4 and u.shape[3] > 1 else "channel")

    @property
    def bias(self) -> Tensor | None:
        """The bias of u's layer."""
        return _value(self[1].bias)


def _value(weight: Any) -> Any:
    """A parameter, if there is one, which quantised layers of torch give by a method."""
    value = weight() if callable(weight) and not isinstance(weight, Tensor) else weight
    return value.dequantize() if value is not None and value.is_quantized else value


def decompress(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with dense layers in place of its low-rank ones: the inverse of `smoothk.factorize`.

    The weights are the products of the factors, so that the outputs agree to rounding; what truncation dropped does not
    come back. The copy shares no tensor with ``model``; modes, dtypes, devices, hooks of other modules, a layer that
    occurs in several places and tied parameters stay what they are. Layers that were transformers' ``Conv1D`` become
    `torch.nn.Linear`.

    Args:
        model: any module; left untouched. Without a low-rank layer the result is a plain copy.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a low-rank layer is parametrised or has hooks, which the dense layer would lose; it is named.
    """
    copied = _copy(model)
    kinds = LowRankLinear | _LowRankConvNd
    layers = {name: module for name, module in copied.named_modules() if isinstance(module, kinds)}
    dense: dict[str, nn.Module] = {}
    weights: dict[tuple, nn.Parameter] = {}
    for name, layer in layers.items():
        new: Conv | nn.Linear = layer.to_linear() if isinstance(layer, LowRankLinear) else layer.to_conv()
        new.register_parameter("bias", layer.bias)
        # Layers that share both factors have the same product and go on to share it.
        key = id(layer.v), id(layer.u), getattr(layer, "groups", 1), tuple(layer.weight_shape)
        new.weight = weights.setdefault(key, new.get_parameter("weight"))
        dense[name] = new
    return replace_layers(copied, dense)


def to_sequential(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which every low-rank layer is the pair of torch layers that computes the same.

    For tools that look for `torch.nn.Linear` or `torch.nn.Conv2d`: quantisers (``quantize_dynamic``, torchao), PEFT,
    hardware compilers. Names become ``fc1.0.weight`` (v), ``fc1.1.weight`` (u) and ``fc1.1.bias``; the number of
    parameters stays. Arguments and errors as in `decompress`; tied factors stay tied.
    """
    copied = _copy(model)
    pairs: dict[str, nn.Module] = {}
    for name, layer in copied.named_modules():
        if isinstance(layer, _LowRank):
            pair = FactorPair(*layer.to_sequential())
            pair[0].weight, pair[1].weight = layer.v, layer.u
            pair[1].register_parameter("bias", layer.bias)
            pairs[name] = pair.train(layer.training)
    return replace_layers(copied, pairs)


def _copy(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, layer in model.named_modules():
        if not isinstance(layer, _LowRank):
            continue
        if parametrize.is_parametrized(layer):
            raise ValueError(f"layer {name!r} must not be parametrised; remove its parametrizations first")
        if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
            raise ValueError(f"layer {name!r} must have no hooks, which a new layer would lose; remove them first")
    return deep_copy(model)
