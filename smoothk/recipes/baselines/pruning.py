"""Magnitude pruning: of single weights by `torch.nn.utils.prune`, of filters, and of channels by Torch-Pruning.

All functions take the budget of `smoothk.compress`, a share of ALL the model's parameters, return a new model, and
take no gradient step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from smoothk.recipes.baselines import channels

LAMP_BISECTIONS = 11  # of the ratio of channels: steps of 1/2048


def prune_weights(model: nn.Module, keep: float) -> nn.Module:
    """Zero the smallest weights of all convolutions and linear layers, ranked together by magnitude.

    The result has the shapes of ``model``; `count_nonzero` gives the parameters that remain. Storing them costs an
    index each, and dense kernels run no faster.

    Raises:
        ValueError: fewer parameters than norms and biases hold are asked for.
    """
    # prune flattens by view; torch's stub of `to` lacks the argument
    pruned: nn.Module = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    layers = [(m, "weight") for m in pruned.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    total = sum(p.numel() for p in model.parameters())
    prunable = sum(layer.weight.numel() for layer, _ in layers)
    surplus = total - math.floor(keep * total)
    if surplus > prunable:
        raise ValueError(f"keep must be at least {(total - prunable) / total:.4f} for this model, got {keep}")
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=surplus)
    for layer, name in layers:
        prune.remove(layer, name)
    return pruned


def count_nonzero(model: nn.Module) -> int:
    """Parameters of ``model`` other than the zeros in its convolution and linear weights."""
    zeros = sum(int((m.weight == 0).sum()) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    return sum(p.numel() for p in model.parameters()) - zeros


def prune_filters(model: nn.Module, keep: float, *, n: int = 1) -> nn.Module:
    """Remove the filters of the smallest Ln norm between the two convolutions of every block (arXiv 1608.08710).

    The filters go for good: rows of the first convolution, entries of its batch norm, columns of the second one. The
    channels that blocks add to are left alone, for every block shares them. All blocks keep the same fraction of their
    filters (at least one), the largest that the budget allows.

    Args:
        model: a network of `smoothk.recipes.models.BasicBlock`.
        keep: share of the model's parameters that may remain.
        n: the norm, 1 or 2.

    Raises:
        ValueError: ``model`` has no such block, or one filter a block is already too many.
    """
    pruned = copy.deepcopy(model)
    groups = channels.inner_channels(pruned)
    for group, count in zip(groups, channels.uniform_counts(pruned, groups, keep), strict=True):
        norms = group.writers[0][0].weight.detach().flatten(1).norm(n, dim=1)
        channels.select(group, norms.topk(count).indices.sort().values)
    return pruned


def prune_lamp(model: nn.Module, example_input: Tensor) -> Callable[[float], nn.Module]:
    """Channel pruning by Torch-Pruning (arXiv 2301.12900), ranked over all layers by LAMP (arXiv 2010.07611).

    The library has no budget of parameters: its ratio of channels is bisected for it. The classifier's outputs stay.

    Args:
        model: any network that the library can trace.
        example_input: one input of it.

    Returns:
        ``keep -> new model``. It raises ValueError where the library removes too little at any ratio.

    Raises:
        ImportError: Torch-Pruning is not installed.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError("pruning by LAMP needs Torch-Pruning: pip install torch-pruning") from error
    total = sum(p.numel() for p in model.parameters())

    def pruned(ratio: float) -> nn.Module:
        small = copy.deepcopy(model)
        heads = [m for m in small.modules() if isinstance(m, nn.Linear)][-1:]
        torch_pruning.pruner.BasePruner(
            small,
            example_input,
            importance=torch_pruning.importance.LAMPImportance(p=2),
            global_pruning=True,
            pruning_ratio=ratio,
            ignored_layers=heads,
        ).step()
        return small

    def compress(keep: float) -> nn.Module:
        best, low, high = None, 0.0, 1.0
        for _ in range(LAMP_BISECTIONS):
            middle = (low + high) / 2
            small = pruned(middle)
            left = sum(p.numel() for p in small.parameters())
            if left <= keep * total:
                best, high = small, middle
            else:
                low = middle
        if best is None:
            raise ValueError(f"keep must be at least {left / total:.4f} for this model, got {keep}")
        return best

    return compress
