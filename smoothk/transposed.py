"""`transformers.pytorch_utils.Conv1D`: a linear layer whose weight is kept transposed, as in GPT-2."""

from __future__ import annotations

import sys

from torch import Tensor, nn


def transposed_linear_types() -> tuple[type[nn.Module], ...]:
    """transformers' ``Conv1D``, weight ``[in_features, out_features]``; none where transformers was not imported, for
    then no model can have one."""
    kind = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return (kind,) if isinstance(kind, type) else ()


def as_linear(layer: nn.Module) -> nn.Linear:
    """A linear layer that computes what the ``Conv1D`` ``layer`` does, on the same memory, in its mode and with its
    ``requires_grad`` flags."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor) and isinstance(bias, nn.Parameter | None)
    rows, columns = weight.shape
    linear = nn.Linear(rows, columns, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().t(), requires_grad=weight.requires_grad)
    linear.register_parameter("bias", bias)
    return linear.train(layer.training)
