"""The mean that truncation takes from a layer's output, given back; data-free.

Post-ReLU inputs are positive on average, so that an error ``ΔW`` of a weight shifts the layer's output by
``ΔW E[x]``: Nagel, van Baalen, Blankevoort & Welling, "Data-free quantization through weight equalization and bias
correction" (arXiv 1906.04721), section 4.2. `smoothk.moments` finds ``E[x]`` in the batch norms before the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import _LowRank
from .modes import outside_inference_mode
from .moments import LayerInput, layer_inputs


@outside_inference_mode
def correct_bias(model: nn.Module, small: nn.Module) -> nn.Module:
    """Make the mean output of every low-rank layer of ``small`` that of the same layer of ``model``, with no data.

    In place; the shift goes into the layer's bias or, where it has none, into the running mean of the batch norm that
    takes its output. The mean input of a layer comes from the batch norms before it, by `torch.fx`; layers behind
    something else (layer norm, max pooling, products) are left as they are. Borders are taken for full of input.
    Recalibrating batch norm afterwards replaces what went into its running means.

    Args:
        model: the dense model, with the running statistics of its training; not changed.
        small: made from it by `smoothk.factorize`.

    Returns:
        ``small``. A second call changes nothing.

    Raises:
        TypeError: ``model`` or ``small`` is not a module.
        ValueError: ``small`` was not made from ``model``.
    """
    for name, network in (("model", model), ("small", small)):
        if not isinstance(network, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(network).__name__}")
    changes: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for name, seen in layer_inputs(model).items():
            try:
                changes += _changes(model, small, name, seen)
            except (AttributeError, RuntimeError) as error:
                raise ValueError(f"small must be made from model, but its {name!r} does not fit: {error}") from None
        for target, value in changes:
            target.copy_(value)
    return small


def _changes(model: nn.Module, small: nn.Module, name: str, seen: LayerInput) -> list[tuple[Tensor, Tensor]]:
    """What is to be written where for one layer."""
    dense, layer = model.get_submodule(name), small.get_submodule(name)
    if not isinstance(layer, _LowRank) or isinstance(dense, _LowRank):
        return []
    assert isinstance(dense.weight, Tensor)
    error = layer.weight.double() - dense.weight.double()
    groups = getattr(layer, "groups", 1)
    taps = error.reshape(groups, len(error) // groups, error.shape[1], -1).sum(-1)
    shift = (taps @ seen.mean.reshape(groups, -1, 1)).reshape(-1)
    if layer.bias is not None:
        assert isinstance(dense.bias, Tensor)
        return [(layer.bias, dense.bias - shift)]
    if seen.norm is None:
        return []
    means = [network.get_submodule(seen.norm).running_mean for network in (small, model)]
    assert isinstance(means[0], Tensor) and isinstance(means[1], Tensor)
    return [(means[0], means[1] + shift)]
