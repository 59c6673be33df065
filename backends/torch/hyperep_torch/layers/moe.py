# SPDX-License-Identifier: Apache-2.0
"""``MoE``: the layer around router and experts."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hyperep.moe.config import MoEConfig, RouterConfig
from hyperep.moe.layer import describe, moe_forward
from hyperep_torch.ambient import platform_on
from hyperep_torch.dtensor_tokens import call_layer
from hyperep_torch.layers.experts import GroupedExperts
from hyperep_torch.layers.feed_forward import FeedForward
from hyperep_torch.layers.router import TopKRouter

__all__ = ["MoE"]

_ROUTER = frozenset(field.name for field in dataclasses.fields(RouterConfig))
_LAYER = frozenset(field.name for field in dataclasses.fields(MoEConfig)) - {"router"}


class MoE(nn.Module):
    """A mixture-of-experts layer: what :func:`hyperep.moe.build_moe` makes, as a class of PyTorch.

    Children are ``router``, ``experts`` and perhaps ``shared_experts``. Shard it by giving ``experts`` a parallel
    style; nothing else changes.

    Args:
        dim: ``D``, the size of a token.
        hidden_dim: ``H`` of each expert.
        num_experts: ``E``.
        top_k: ``K``, experts a token.
        device: of the parameters; PyTorch's default, ``torch.device("meta")`` for instance.
        dtype: of the parameters; PyTorch's default.
        options: the other fields of :class:`hyperep.moe.MoEConfig` and :class:`hyperep.moe.RouterConfig`.

    Raises:
        TypeError: there is no such option.
        ValueError: one is out of its range.

    Example:
        >>> import torch, hyperep_torch as hep
        >>> with torch.device("meta"):
        ...     layer = hep.MoE(64, 128, num_experts=8, top_k=2, score_function="sigmoid", num_shared_experts=1)
        >>> {name: tuple(p.shape) for name, p in layer.experts.named_parameters()}
        {'w1': (8, 128, 64), 'w2': (8, 64, 128), 'w3': (8, 128, 64)}
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        unknown = sorted(set(options) - _ROUTER - _LAYER)
        if unknown:
            known = sorted((_ROUTER | _LAYER) - {"dim", "hidden_dim", "num_experts", "top_k"})
            raise TypeError(f"MoE has no options {unknown}; it has {known}")
        super().__init__()
        routing = {name: value for name, value in options.items() if name in _ROUTER}
        rest = {name: value for name, value in options.items() if name in _LAYER}
        router = RouterConfig(num_experts=num_experts, top_k=top_k, **routing)
        self.config = config = MoEConfig(dim=dim, hidden_dim=hidden_dim, router=router, **rest)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.router = TopKRouter(dim, router, **made)
        self.experts = GroupedExperts(dim, hidden_dim, num_experts, **made)
        if config.num_shared_experts:
            self.shared_experts = FeedForward(dim, config.num_shared_experts * hidden_dim, **made)

    @classmethod
    def of(
        cls, config: MoEConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MoE:
        """The layer of a configuration, of one of ``hyperep.moe.PRESETS`` for instance."""
        parts = [(record, f.name) for record in (config, config.router) for f in dataclasses.fields(record)]
        options = {name: getattr(record, name) for record, name in parts if name != "router"}
        return cls(device=device, dtype=dtype, **options)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> Any:
        """Every token of ``[..., D]`` through its experts; ``with_stats=True`` for the ``MoEStats`` beside it.

        A DTensor gives one of its layout; statistics are those of the tokens that this rank has computed.
        """
        forward = functools.partial(moe_forward, platform_on(x.device), self.config, self)
        if isinstance(x, DTensor):
            return call_layer(self, self.experts, forward, x, **kwargs)
        return forward(x, **kwargs)

    def extra_repr(self) -> str:  # noqa: D102
        return describe(self.config)
