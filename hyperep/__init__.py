# SPDX-License-Identifier: Apache-2.0
"""hyperep: expert parallelism that is written once and runs on every platform.

The names below are loaded when they are first used: importing hyperep imports no framework, and costs little more
than importing NumPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyperep.distribute import distribute_module, distribute_parameter, distribute_tensor
    from hyperep.exchange.balance import Balance
    from hyperep.exchange.rows import DispatchContext, combine, dispatch
    from hyperep.mesh import DeviceMesh, init_device_mesh
    from hyperep.placements import Partial, Replicate, Shard
    from hyperep.platform.selection import get_platform, use_platform
    from hyperep.styles import (
        BaseExpertParallel,
        ColwiseParallel,
        ExpertParallel,
        ExpertTensorParallel,
        ParallelStyle,
        RowwiseParallel,
        TensorParallel,
        parallelize_module,
    )

__version__ = "0.1.0"

_HOME = {
    "Balance": "hyperep.exchange.balance",
    "BaseExpertParallel": "hyperep.styles",
    "ColwiseParallel": "hyperep.styles",
    "DeviceMesh": "hyperep.mesh",
    "DispatchContext": "hyperep.exchange.rows",
    "ExpertParallel": "hyperep.styles",
    "ExpertTensorParallel": "hyperep.styles",
    "ParallelStyle": "hyperep.styles",
    "Partial": "hyperep.placements",
    "Replicate": "hyperep.placements",
    "RowwiseParallel": "hyperep.styles",
    "Shard": "hyperep.placements",
    "TensorParallel": "hyperep.styles",
    "combine": "hyperep.exchange.rows",
    "dispatch": "hyperep.exchange.rows",
    "distribute_module": "hyperep.distribute",
    "distribute_parameter": "hyperep.distribute",
    "distribute_tensor": "hyperep.distribute",
    "get_platform": "hyperep.platform.selection",
    "init_device_mesh": "hyperep.mesh",
    "parallelize_module": "hyperep.styles",
    "use_platform": "hyperep.platform.selection",
}

__all__ = [
    "Balance",
    "BaseExpertParallel",
    "ColwiseParallel",
    "DeviceMesh",
    "DispatchContext",
    "ExpertParallel",
    "ExpertTensorParallel",
    "ParallelStyle",
    "Partial",
    "Replicate",
    "RowwiseParallel",
    "Shard",
    "TensorParallel",
    "combine",
    "dispatch",
    "distribute_module",
    "distribute_parameter",
    "distribute_tensor",
    "get_platform",
    "init_device_mesh",
    "parallelize_module",
    "use_platform",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hyperep' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
