# SPDX-License-Identifier: Apache-2.0
"""``TopKRouter``: which experts a token goes to, and with what weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hyperep.moe.config import RouterConfig
from hyperep.moe.router import Routing, router_forward
from hyperep_torch.ambient import platform_on, prepare_platform_on
from hyperep_torch.kept_state import KeepsState
from hyperep_torch.layers.init import uniform_fan_in_
from hyperep_torch.modules import LocalView, OpensItself

__all__ = ["TopKRouter"]


class TopKRouter(OpensItself, KeepsState, nn.Module):
    """Routes tokens ``[T, D]`` by a linear gate; what the core's :func:`hyperep.moe.TopKRouter` does.

    Args:
        dim: ``D``.
        config: ``E``, ``K`` and how scores are made.
        device: of the parameters; PyTorch's default.
        dtype: of the parameters; PyTorch's default. Scores are computed in float32 at least.
    """

    def __init__(
        self,
        dim: int,
        config: RouterConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Parameter(torch.empty(config.num_experts, dim, device=device, dtype=dtype))
        if config.expert_bias:
            self.register_buffer("expert_bias", torch.empty(config.num_experts, device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the gate anew, and forget the bias."""
        prepare_platform_on(self.gate.device)
        uniform_fan_in_(self.gate)
        if self.config.expert_bias:
            nn.init.zeros_(self.expert_bias)

    def forward(self, x: torch.Tensor, *inputs: Any, **kwargs: Any) -> Routing:
        """The decision for each token."""
        return router_forward(platform_on(x.device), self.config, LocalView(self), x, *inputs, **kwargs)

    def extra_repr(self) -> str:  # noqa: D102
        return repr(self.config)
