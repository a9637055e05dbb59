"""Trained Rank Pruning (Xu et al., arXiv 1910.04576): weights are truncated now and then while they are trained."""

from __future__ import annotations

import torch
from torch import nn

from smoothk.svd import rank_for_energy, squared_singular_values, truncated_factors
from smoothk.unfolding import fold


@torch.no_grad()
def truncate(model: nn.Module, energy: float) -> None:
    """Replace every convolution's weight, as ``[C_out, C_in*k_h*k_w]``, by the truncated SVD of the smallest rank whose
    share of ``Σσ²`` reaches ``energy``, in place."""
    for conv in (module for module in model.modules() if isinstance(module, nn.Conv2d)):
        rank = rank_for_energy(squared_singular_values(conv.weight, conv.groups), energy)
        u, v = truncated_factors(conv.weight, rank, conv.groups)
        conv.weight.copy_(fold(u @ v, conv.weight.shape))
