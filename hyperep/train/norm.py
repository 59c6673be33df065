# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square normalisation (arXiv:1910.07467)."""

from __future__ import annotations

from typing import Any

import numpy as np

from hyperep.platform.protocol import Module, Platform

__all__ = ["RMSNorm"]


def RMSNorm(platform: Platform[Any], dim: int, *, eps: float = 1e-5) -> Module:  # noqa: N802 (it makes modules)
    """Make a module that scales rows ``[T, D]`` to a root mean square of one, then by a trained weight ``[D]``."""
    xp = platform.xp

    def forward(m: Any, x: Any) -> Any:
        return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps) * m.weight

    weights = {"weight": platform.from_host(np.ones(dim, np.float32))}
    return platform.make_module("RMSNorm", weights, forward, description=f"{dim}, eps={eps}")
