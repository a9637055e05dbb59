"""The mean that truncation takes from a layer's output, given back; data-free.

Post-ReLU inputs are positive on average, so that an error ``ΔW`` of a weight shifts the layer's output by
``ΔW E[x]``: Nagel, van Baalen, Blankevoort & Welling, "Data-free quantization through weight equalization and bias
correction" (arXiv 1906.04721), section 4.2. `smoothk.moments` finds ``E[x]`` in the batch norms before the layer.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .layers import _LowRank
from .modes import outside_inference_mode, without_autocast
from .moments import LayerInput, layer_inputs
from .tracing import CONVS
from .transposed import as_linear, transposed_linear_types


@outside_inference_mode
def correct_bias(model: nn.Module, small: nn.Module) -> nn.Module:
    """Give the low-rank layers of ``small`` the mean outputs of the same layers of ``model``, with no data.

    In place, directly after `smoothk.factorize`; what training or recalibration made of ``small`` since is replaced.
    The shift goes into a layer's bias or, where it has none, into the running mean of the batch norm that alone takes
    its output. The mean input of a layer comes from the batch norms before it, through what `torch.fx` can trace;
    layers behind something else (layer norm, max pooling, products, activations of averages or of sums of branches,
    hooks) are left as they are. Of a model that cannot be traced as a whole the parts are looked at, as if the model
    did nothing with them but call them, a `torch.nn.Sequential` as a whole. Borders are taken for full of input.
    Recalibrating batch norm afterwards replaces what went into its running means.

    Args:
        model: the dense model, with the running statistics of its training; not changed.
        small: made from it by `smoothk.factorize`.

    Returns:
        ``small``. A second call changes nothing.

    Raises:
        TypeError: ``model`` or ``small`` is not a module.
        ValueError: ``small`` was not made from ``model`` by `smoothk.factorize`, as far as can be seen.
    """
    for name, network in (("model", model), ("small", small)):
        if not isinstance(network, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(network).__name__}")
    _check_pair(model, small)
    changes: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for name, seen in layer_inputs(model).items():
            try:
                changes += _changes(model, small, name, seen)
            except (AttributeError, RuntimeError) as error:
                raise ValueError(f"small must be made from model, but its {name!r} does not fit: {error}") from None
        for target, value in changes:
            with torch.inference_mode() if target.is_inference() else nullcontext():
                target.copy_(value)
    return small


def _check_pair(model: nn.Module, small: nn.Module) -> None:
    """Raise ValueError if a layer shows that ``small`` was not made from ``model``."""
    if _is_low_rank(model) and not _is_low_rank(small):
        raise ValueError("small must be made from model, but it has no low-rank layer, and model has")
    dense = dict(model.named_modules(remove_duplicate=False))
    for name, layer in small.named_modules():
        other, begin = dense.get(name), f"small must be made from model, but its {name!r}"
        if isinstance(other, transposed_linear_types()):
            other = as_linear(other)
        if isinstance(layer, _LowRank):
            expected, weight = list(layer.weight_shape), getattr(other, "weight", None)
            if not isinstance(weight, Tensor) or list(weight.shape) != expected:
                got = list(weight.shape) if isinstance(weight, Tensor) else "none"
                raise ValueError(f"{begin} has a weight of shape {expected}, and that of model {got}")
        elif type(other) in (nn.Linear, *CONVS) and isinstance(layer, nn.Sequential):
            raise ValueError(f"{begin} is a {type(layer).__name__}: correct before smoothk.to_sequential")


def _is_low_rank(model: nn.Module) -> bool:
    return any(isinstance(module, _LowRank) for module in model.modules())


def _changes(model: nn.Module, small: nn.Module, name: str, seen: LayerInput) -> list[tuple[Tensor, Tensor]]:
    """What is to be written where for one layer."""
    dense, layer = model.get_submodule(name), small.get_submodule(name)
    if not isinstance(layer, _LowRank):
        return []
    norms = [] if seen.norm is None else [network.get_submodule(seen.norm) for network in (model, small)]
    shift = _shift(dense, layer, seen.mean)
    if isinstance(dense.bias, Tensor) and isinstance(layer.bias, Tensor):
        return [(layer.bias, dense.bias - shift)]
    if dense.bias is not layer.bias:
        raise AttributeError("one of the two has a bias")
    if not norms:
        return []
    before, after = (norm.running_mean for norm in norms)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        raise AttributeError("the batch norm behind it has no running mean")
    return [(after, before + shift.to(before.device))]


def _shift(dense: nn.Module, layer: _LowRank, mean: Tensor) -> Tensor:
    """What the mean output changes by, where the inputs' is ``mean`` ``[C_in]``."""
    assert isinstance(dense.weight, Tensor)
    with without_autocast([layer.u]):
        error = layer.weight.double() - dense.weight.double()
    groups = getattr(layer, "groups", 1)
    taps = error.reshape(groups, len(error) // groups, error.shape[1], -1).sum(-1)
    return (taps @ mean.to(error.device).reshape(groups, -1, 1)).reshape(-1)
