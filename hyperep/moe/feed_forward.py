# SPDX-License-Identifier: Apache-2.0
"""``FeedForward``: one SwiGLU network for every token; shared experts are one."""

from __future__ import annotations

from typing import Any

from hyperep.moe.init import Seed, generator
from hyperep.moe.linear import Linear
from hyperep.platform.protocol import Module, Platform

__all__ = ["FeedForward"]


def FeedForward(  # noqa: N802 (it makes modules, as a class would)
    platform: Platform[Any], dim: int, hidden_dim: int, *, seed: Seed | None = None
) -> Module:
    """Make a native module that computes ``w2(silu(w1(x)) * w3(x))`` (SwiGLU, arXiv:2002.05202).

    Args:
        platform: whose module to make.
        dim: ``D``.
        hidden_dim: ``H``.
        seed: of the initial weights; see :mod:`hyperep.moe.init`. Left out, each module gets others.

    Returns:
        A module with children ``w1``, ``w3`` (``Linear``, weight ``[H, D]``) and ``w2`` (``[D, H]``), called with
        ``[..., D]``. For tensor parallelism apply ``ColwiseParallel`` to the first two and ``RowwiseParallel`` to the
        third.

    Raises:
        ValueError: a size is below one.
    """
    rng = generator(platform, seed)
    sizes = {"w1": (dim, hidden_dim), "w2": (hidden_dim, dim), "w3": (dim, hidden_dim)}
    children = {name: Linear(platform, *size, seed=rng) for name, size in sizes.items()}

    def forward(m: Any, x: Any) -> Any:
        return m.w2(platform.swiglu(m.w1(x), m.w3(x)))

    description = f"dim={dim}, hidden_dim={hidden_dim}"
    return platform.make_module("FeedForward", {}, forward, children=children, description=description)
