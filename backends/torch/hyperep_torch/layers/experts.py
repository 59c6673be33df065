# SPDX-License-Identifier: Apache-2.0
"""``GroupedExperts``: the SwiGLU feed-forward networks of all experts, as three stacked weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hyperep.moe.experts import TAKES, experts_forward
from hyperep_torch.ambient import platform_on, prepare_platform_on
from hyperep_torch.layers.init import uniform_fan_in_
from hyperep_torch.modules import LocalView, OpensItself

__all__ = ["GroupedExperts"]


class GroupedExperts(OpensItself, nn.Module):
    """``E`` experts, ``y = (silu(x w1^T) * (x w3^T)) w2^T`` (SwiGLU, arXiv:2002.05202).

    Called as the core's :func:`hyperep.moe.GroupedExperts` is; parameters ``w1``, ``w3`` ``[E, H, D]`` and ``w2``
    ``[E, D, H]``.

    Args:
        dim: ``D``, the size of a row.
        hidden_dim: ``H``, the hidden size of each expert.
        num_experts: ``E``.
        device: of the parameters; PyTorch's default, ``torch.device("meta")`` for instance.
        dtype: of the parameters; PyTorch's default.

    Raises:
        ValueError: a size is below one.
    """

    takes = TAKES

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, size in (("dim", dim), ("hidden_dim", hidden_dim), ("num_experts", num_experts)):
            if size < 1:
                raise ValueError(f"GroupedExperts({name}={size}): must be at least 1")
        super().__init__()
        shapes = {
            "w1": (num_experts, hidden_dim, dim),
            "w2": (num_experts, dim, hidden_dim),
            "w3": (num_experts, hidden_dim, dim),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.num_experts = num_experts
        self._description = f"dim={dim}, hidden_dim={hidden_dim}, num_experts={num_experts}"
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        prepare_platform_on(self.w1.device)
        for weight in (self.w1, self.w2, self.w3):
            uniform_fan_in_(weight)

    def forward(self, *inputs: Any, **kwargs: Any) -> torch.Tensor:
        """Tokens or rows through the experts' networks; see the core's function."""
        return experts_forward(platform_on(inputs[0].device), self.num_experts, LocalView(self), *inputs, **kwargs)

    def extra_repr(self) -> str:  # noqa: D102
        return self._description
