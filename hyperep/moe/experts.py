# SPDX-License-Identifier: Apache-2.0
"""``GroupedExperts``: the SwiGLU feed-forward networks of all experts, as three stacked weights."""

from __future__ import annotations

from typing import Any

from hyperep.exchange.routed import added_to, routed_from_rows
from hyperep.moe.config import require_whole
from hyperep.moe.init import Seed, generator, uniform_fan_in
from hyperep.platform.protocol import Module, Platform

__all__ = ["TAKES", "GroupedExperts", "experts_forward"]

TAKES = ("tokens", "rows")
"""The calls that the experts take: see :mod:`hyperep.styles.calls`."""


def GroupedExperts(  # noqa: N802 (it makes modules, as a class would)
    platform: Platform[Any], dim: int, hidden_dim: int, num_experts: int, *, seed: Seed | None = None
) -> Module:
    """Make a native module of ``E`` experts, ``y = (silu(x w1^T) * (x w3^T)) w2^T`` (SwiGLU, arXiv:2002.05202).

    Args:
        platform: whose module to make.
        dim: ``D``, the size of a row.
        hidden_dim: ``H``, the hidden size of each expert.
        num_experts: ``E``.
        seed: of the initial weights; see :mod:`hyperep.moe.init`. Left out, each module gets others.

    Returns:
        A module with parameters ``w1``, ``w3`` ``[E, H, D]`` and ``w2`` ``[E, D, H]``, float32, that takes both calls
        of experts (:mod:`hyperep.styles.calls`):

        * tokens ``[T, D]``, integers ``[T, K]``, the experts of each token, and weights ``[T, K]``; returns ``[T, D]``,
          each token's experts weighted and added up in float32. Index ``E`` means nobody. ``rows=`` tells how many
          choices are not nobody, where that is known, and saves a copy to the host. What ``meanwhile=``, a module,
          makes of the tokens is added; under a style it is computed while tokens travel, if the style hides that.
        * rows ``[N, D]`` sorted by expert and an integer tensor ``[E]`` of how many rows each expert gets; returns
          ``[N, D]``.

        After a parallel style was applied, all are the caller's own, and ``E`` stays the global number.

    Raises:
        ValueError: a size is below one.
    """
    for name, size in (("dim", dim), ("hidden_dim", hidden_dim), ("num_experts", num_experts)):
        require_whole(f"GroupedExperts: {name}", size)
        if size < 1:
            raise ValueError(f"GroupedExperts({name}={size}): must be at least 1")
    rng = generator(platform, seed)
    shapes = {
        "w1": (num_experts, hidden_dim, dim),
        "w2": (num_experts, dim, hidden_dim),
        "w3": (num_experts, hidden_dim, dim),
    }
    weights = {name: platform.from_host(uniform_fan_in(rng, shape)) for name, shape in shapes.items()}

    def forward(m: Any, x: Any, *routing: Any, **options: Any) -> Any:
        return experts_forward(platform, num_experts, m, x, *routing, **options)

    description = f"dim={dim}, hidden_dim={hidden_dim}, num_experts={num_experts}"
    module = platform.make_module("GroupedExperts", weights, forward, description=description)
    module.takes = TAKES
    return module


def experts_forward(
    platform: Platform[Any],
    num_experts: int,
    m: Any,
    x: Any,
    *routing: Any,
    rows: int | None = None,
    meanwhile: Module | None = None,
) -> Any:
    """What experts ``m`` with ``w1``, ``w2`` and ``w3`` make of tokens or rows; see :func:`GroupedExperts`."""

    def by_row(x: Any, tokens_per_expert: Any) -> Any:
        return platform.grouped_swiglu(x, m.w1, m.w2, m.w3, tokens_per_expert)

    if len(routing) == 1:
        out = by_row(x, *routing)
    else:
        out = routed_from_rows(platform, by_row, num_experts)(x, *routing, rows=rows)
    return added_to(out, meanwhile, x)
