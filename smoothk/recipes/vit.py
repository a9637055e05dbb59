"""A small vision transformer of plain modules, every weight of which is that of a linear layer or a convolution.

Dosovitskiy et al. 2021, "An Image Is Worth 16x16 Words" (arXiv 2010.11929), with the simplifications of Beyer et al.
2022, "Better plain ViT baselines for ImageNet-1k" (arXiv 2205.01580): fixed sine-cosine positions and the mean over
tokens in place of a class token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head self-attention.

    Queries, keys and values are one `nn.Linear`, [3 dim, dim]: compression sees it and gives the three a joint factor.
    The `in_proj_weight` of `nn.MultiheadAttention` is a bare parameter, which it would leave dense.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [N, T, dim] to [N, T, dim]."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then two linear layers of each token alone, both behind a layer norm and added to what comes in."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [N, T, dim] to [N, T, dim]."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer for small images of any size.

    Args:
        depth: number of blocks.
        dim: length of a token, a multiple of 4 and of ``heads``.
        heads: of the attention.
        patch: side of the squares that become tokens; pixels that fill none, at the right and lower edge, are left out.
        num_classes: length of the output.
        in_channels: channels of the images.
    """

    def __init__(self, depth: int, dim: int, heads: int, patch: int, num_classes: int, *, in_channels: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, dim, patch, stride=patch)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, in_channels, H, W] to logits [N, num_classes]."""
        x = self.patches(x)
        _, dim, rows, columns = x.shape
        positions = sine_cosine_positions(rows, columns, dim, x.device)
        x = x.flatten(2).transpose(1, 2) + positions.to(x.dtype)
        return self.fc(self.norm(self.blocks(x)).mean(dim=1))


def sine_cosine_positions(rows: int, columns: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Fixed encodings of the places of a grid, float32 [rows * columns, dim]; ``dim`` is a multiple of 4.

    A quarter each: sines and cosines of the column, sines and cosines of the row, of wavelengths from 2 pi to 20,000 pi
    (Vaswani et al. 2017, arXiv 1706.03762, section 3.5, for two axes as in Beyer et al.).
    """
    frequencies = 10_000 ** -torch.linspace(0, 1, dim // 4, device=device)
    row, column = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (column, row)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
