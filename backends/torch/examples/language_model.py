# SPDX-License-Identifier: Apache-2.0
"""A small mixture-of-experts language model over bytes: plain PyTorch, but for one layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["Transformer"]


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, S, D] -> [B, S, D]``."""
        batch, length, dim = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.heads, dim // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # [B, heads, S, D / heads] each
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(attended.transpose(1, 2).reshape(batch, length, dim))


class Block(nn.Module):
    """Attention, then a mixture of experts."""

    def __init__(self, dim: int, heads: int, moe: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.attention_norm, self.moe_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.attention = Attention(dim, heads)
        self.moe = moe()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, S, D] -> [B, S, D]``."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.moe(self.moe_norm(x))


class Transformer(nn.Module):
    """From bytes ``[B, S]`` to logits of the next ones.

    Args:
        moe: makes the layer that takes the place of a feed-forward network in each block.
        dim: ``D``.
        num_layers: blocks.
        heads: of attention.
        context: the longest sequence, ``S``.
        vocabulary: number of different tokens.
    """

    def __init__(
        self,
        moe: Callable[[], nn.Module],
        *,
        dim: int,
        num_layers: int = 2,
        heads: int = 4,
        context: int = 64,
        vocabulary: int = 256,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, dim)
        self.positions = nn.Embedding(context, dim)
        self.layers = nn.ModuleList(Block(dim, heads, moe) for _ in range(num_layers))
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits ``[B * S, vocabulary]``."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).flatten(0, 1))
