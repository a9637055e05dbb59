"""What SVD is compared with: magnitude pruning by `torch.nn.utils.prune`, with parameter counts that hold.

Both functions take the budget of `smoothk.compress`, a share of ALL the model's parameters, return a new model, and
take no gradient step.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from smoothk.recipes.models import BasicBlock


def prune_weights(model: nn.Module, keep: float) -> nn.Module:
    """Zero the smallest weights of all convolutions and linear layers, ranked together by magnitude.

    The result has the shapes of ``model``; `count_nonzero` gives the parameters that remain. Storing them costs an
    index each, and dense kernels run no faster.

    Raises:
        ValueError: fewer parameters than norms and biases hold are asked for.
    """
    pruned = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # prune flattens by view
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


def prune_filters(model: nn.Module, keep: float) -> nn.Module:
    """Remove the filters of the smallest L1 norm between the two convolutions of every residual block.

    The filters go for good: rows of the first convolution, entries of its batch norm, columns of the second one. The
    channels that blocks add to are left alone, for every block shares them. All blocks keep the same fraction of their
    filters (at least one), the largest that the budget allows.

    Args:
        model: a network of `smoothk.recipes.models.BasicBlock`.
        keep: share of the model's parameters that may remain.

    Raises:
        ValueError: ``model`` has no such block, or one filter a block is already too many.
    """
    pruned = copy.deepcopy(model)
    blocks = [module for module in pruned.modules() if isinstance(module, BasicBlock)]
    if not blocks:
        raise ValueError("model must have residual blocks (smoothk.recipes.models.BasicBlock), got none")
    total = sum(p.numel() for p in model.parameters())
    for block, kept in zip(blocks, _filters_to_keep(blocks, total, keep), strict=True):
        _cut(block, _largest_filters(block.conv1, kept))
    return pruned


def _filters_to_keep(blocks: list[BasicBlock], total: int, keep: float) -> list[int]:
    """Filters that stay in each block, for the largest common fraction within the budget."""
    counts = [block.conv1.out_channels for block in blocks]
    costs = [_parameters_per_filter(block) for block in blocks]
    fractions = sorted({k / n for n in counts for k in range(n + 1)}, reverse=True)
    for fraction in fractions:
        kept = [max(1, math.floor(fraction * n + 1e-9)) for n in counts]
        left = total - sum((n - k) * cost for n, k, cost in zip(counts, kept, costs, strict=True))
        if left <= keep * total:
            return kept
    raise ValueError(f"keep must be at least {left / total:.4f} for this model, got {keep}")


def _parameters_per_filter(block: BasicBlock) -> int:
    """What goes with one filter: its own weights, its batch norm's scale and shift, and what the next layer reads."""
    return block.conv1.weight[0].numel() + 2 + block.conv2.weight[:, 0].numel()


def _largest_filters(conv: nn.Conv2d, count: int) -> Tensor:
    """Indices of the ``count`` filters that `torch.nn.utils.prune.ln_structured` leaves, in order."""
    probe = copy.deepcopy(conv)
    prune.ln_structured(probe, "weight", amount=conv.out_channels - count, n=1, dim=0)
    return probe.weight_mask.flatten(1).any(1).nonzero().flatten()


@torch.no_grad()
def _cut(block: BasicBlock, kept: Tensor) -> None:
    """Leave only the filters ``kept`` between the block's two convolutions, in place."""
    first, norm, second = block.conv1, block.bn1, block.conv2
    first.weight = nn.Parameter(first.weight[kept].clone())
    first.out_channels = norm.num_features = second.in_channels = len(kept)
    norm.weight, norm.bias = nn.Parameter(norm.weight[kept].clone()), nn.Parameter(norm.bias[kept].clone())
    norm.running_mean, norm.running_var = norm.running_mean[kept].clone(), norm.running_var[kept].clone()
    second.weight = nn.Parameter(second.weight[:, kept].clone())
