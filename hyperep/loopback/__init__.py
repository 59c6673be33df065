# SPDX-License-Identifier: Apache-2.0
"""The reference platform: NumPy, every rank a thread of one process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyperep.loopback.launch import run
    from hyperep.loopback.platform import LoopbackPlatform

__all__ = ["LoopbackPlatform", "run"]


def __getattr__(name: str) -> Any:
    # Lazy, so that listing platforms does not load the tape.
    if name == "run":
        from hyperep.loopback.launch import run

        return run
    if name == "LoopbackPlatform":
        from hyperep.loopback.platform import LoopbackPlatform

        return LoopbackPlatform
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
