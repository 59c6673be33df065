# SPDX-License-Identifier: Apache-2.0
"""``FeedForward``: one SwiGLU network for every token; shared experts are one."""

from __future__ import annotations

import torch
from torch import nn

from hyperep_torch.ambient import platform_on

__all__ = ["FeedForward"]


class FeedForward(nn.Module):
    """``w2(silu(w1(x)) * w3(x))`` of three ``nn.Linear`` (SwiGLU, arXiv:2002.05202), called with ``[..., D]``.

    Args:
        dim: ``D``.
        hidden_dim: ``H``.
        device: of the parameters; PyTorch's default.
        dtype: of the parameters; PyTorch's default.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made = {"bias": False, "device": device, "dtype": dtype}
        self.w1 = nn.Linear(dim, hidden_dim, **made)
        self.w2 = nn.Linear(hidden_dim, dim, **made)
        self.w3 = nn.Linear(dim, hidden_dim, **made)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Every token through the network."""
        return self.w2(platform_on(x.device).swiglu(self.w1(x), self.w3(x)))
