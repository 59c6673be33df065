# SPDX-License-Identifier: Apache-2.0
"""The experts of transformers, computed by grouped products from the weights as they lie there.

transformers asks a registry how experts are computed, by the name in their config. Registered here as ``"hyperep"``,
beside its own ``"eager"``, ``"batched_mm"`` and ``"grouped_mm"``; one device or many. Which layout the weights have, a
class of experts declares by flags, which its modules carry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

import hyperep
from hyperep.exchange.routed import routed_from_rows
from hyperep_torch.grouped import grouped_matmul
from hyperep_torch.packed import packed_swiglu
from hyperep_torch.swiglu import can_fuse

__all__ = ["EXPERTS_IMPLEMENTATION", "declares_its_layout", "experts_forward"]

EXPERTS_IMPLEMENTATION = "hyperep"
"""The name in a config's ``_experts_implementation``."""

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


def declares_its_layout(module: nn.Module) -> bool:
    """Whether *module* is an experts module of a class that asks transformers' registry how it is computed."""
    return all(isinstance(getattr(module, flag, None), bool) for flag in _FLAGS) and hasattr(module, "down_proj")


def experts_forward(self: nn.Module, x: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
    """What the experts module *self* makes of tokens, or of rows that are sorted by expert.

    Args:
        self: the experts, whole or this rank's.
        x: tokens ``[T, D]``, or rows ``[N, D]``.
        routing: for tokens, integers ``[T, K]`` and weights ``[T, K]``, where the number of experts and more means
            nobody; for rows, how many each expert gets, integers ``[E]``.

    Returns:
        ``[T, D]`` or ``[N, D]``, in the dtype of *x*.
    """
    if len(routing) == 1:
        return _of_rows(self, x, *routing)
    routed = routed_from_rows(
        hyperep.get_platform("torch"), lambda rows, sizes: _of_rows(self, rows, sizes), self.down_proj.shape[0]
    )
    return routed(x, *routing).to(x.dtype)


def _of_rows(m: Any, rows: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    if _is_plain_swiglu(m) and can_fuse(rows, m.down_proj):
        return _with_norm(m, packed_swiglu(rows, m.gate_up_proj, m.down_proj, sizes))
    first = "gate_up_proj" if m.has_gate else "up_proj"
    projected = _linear(m, first, rows, sizes)
    hidden = _gate(m)(m, projected) if m.has_gate else m.act_fn(projected)
    return _with_norm(m, _linear(m, "down_proj", hidden, sizes))


def _is_plain_swiglu(m: Any) -> bool:
    """Gate on top of up, ``silu(gate) * up``, no bias, each weight ``[E, out, in]``."""
    if not m.has_gate or m.has_bias or m.is_transposed or not m.is_concatenated:
        return False
    if _gate(m) is not _default_apply_gate:
        return False
    activation = getattr(m, "act_fn", None)
    return isinstance(activation, nn.SiLU | SiLUActivation) or activation is F.silu


def _gate(m: Any) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Both projections to hidden rows."""
    return getattr(type(m), "_apply_gate", _default_apply_gate)


def _linear(m: Any, name: str, rows: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    bias = getattr(m, name + "_bias") if m.has_bias else None
    return grouped_matmul(rows, getattr(m, name), sizes, bias=bias, transposed=m.is_transposed)


def _with_norm(m: Any, rows: torch.Tensor) -> torch.Tensor:
    return m.post_expert_norm(rows) if getattr(m, "has_post_expert_norm", False) else rows


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)
