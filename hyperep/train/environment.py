# SPDX-License-Identifier: Apache-2.0
"""Where a run took place, for its report."""

from __future__ import annotations

import os
import platform as host
from datetime import UTC, datetime
from typing import Any

import numpy as np

import hyperep
from hyperep.platform.protocol import Platform
from hyperep.platform.registry import default_registry

__all__ = ["describe_environment"]


def describe_environment(platform: Platform[Any]) -> dict[str, str]:
    """Versions and device, as people read them."""
    return {
        "hyperep": hyperep.__version__,
        "Platform": platform.name,
        "Framework": _framework(platform.name),
        "Device": platform.device,
        "Ranks": str(platform.world_size),
        "Python": f"{host.python_implementation()} {host.python_version()}",
        "NumPy": np.__version__,
        "System": f"{host.system()} {host.release()}, {host.machine()}",
        "CPU cores": str(os.cpu_count() or "unknown"),
        "Date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _framework(name: str) -> str:
    registry = default_registry()
    # A platform object need not come from the registry: a test may pass in its own.
    viability = registry.candidate(name).viability if name in registry.names() else None
    return viability.framework if viability and viability.framework else "unknown"
