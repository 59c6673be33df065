# SPDX-License-Identifier: Apache-2.0
"""In which precision a run computes, and why that is double where it can be.

A router's choice is a jump: where two experts are nearly level, rounding decides, and rounding differs with the number
of ranks and the platform. The token that goes elsewhere changes the weights a little, so more tokens go elsewhere, and
a few dozen steps later two runs in float32 have nothing in common but their statistics. In float64 the noise is so
small that no choice ever meets it: losses agree to about 1e-12, over any number of steps.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.errors import UnsupportedCapability
from hyperep.platform.protocol import Platform

__all__ = ["choose_dtype", "in_precision"]


def choose_dtype(platform: Platform[Any], wanted: str) -> str:
    """``"float64"`` or ``"float32"``: what is wanted, or for ``"auto"`` double where the platform has it natively.

    Raises:
        UnsupportedCapability: float64 is wanted from a platform without it.
    """
    support = platform.capabilities.get(Capability.FLOAT64, Support.UNSUPPORTED)
    if wanted == "auto":
        return "float64" if support is Support.FULL else "float32"
    if wanted == "float64" and support is Support.UNSUPPORTED:
        raise UnsupportedCapability(platform.name, Capability.FLOAT64, "train with --dtype float32 or auto")
    return wanted


def in_precision(platform: Platform[Any], dtype: str) -> Platform[Any]:
    """The platform, such that modules which are built with it have weights of *dtype*."""
    return platform if dtype == "float32" else cast(Platform[Any], _Double(platform))


class _Double:
    """A platform whose float32 arrays from the host arrive as float64. Everything else is the platform's own."""

    def __init__(self, platform: Platform[Any]) -> None:
        self._platform = platform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    def from_host(self, array: np.ndarray) -> Any:
        return self._platform.from_host(array.astype(np.float64) if array.dtype == np.float32 else array)
