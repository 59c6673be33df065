# SPDX-License-Identifier: Apache-2.0
"""PyTorch platform for hyperep, and expert parallelism as PyTorch expects it.

Importing this package imports no framework. The names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyperep_torch.adapters import shard_adapters
    from hyperep_torch.data_parallel import fully_shard
    from hyperep_torch.full_state import full_state_dict
    from hyperep_torch.gradient_norm import clip_grad_norm_
    from hyperep_torch.grouped import grouped_matmul
    from hyperep_torch.initial import init_weights
    from hyperep_torch.layers import GroupedExperts, MoE, TopKRouter
    from hyperep_torch.load_full_state import load_full_state_dict
    from hyperep_torch.packed import packed_swiglu
    from hyperep_torch.scaler import GradScaler
    from hyperep_torch.stacked import StackedExperts, stack_experts
    from hyperep_torch.styles import (
        ColwiseParallel,
        ExpertParallel,
        ExpertTensorParallel,
        RowwiseParallel,
        TensorParallel,
        parallelize_module,
    )
    from hyperep_torch.swiglu import grouped_swiglu

_HOME = {
    "ColwiseParallel": "hyperep_torch.styles",
    "ExpertParallel": "hyperep_torch.styles",
    "ExpertTensorParallel": "hyperep_torch.styles",
    "GradScaler": "hyperep_torch.scaler",
    "GroupedExperts": "hyperep_torch.layers",
    "MoE": "hyperep_torch.layers",
    "RowwiseParallel": "hyperep_torch.styles",
    "StackedExperts": "hyperep_torch.stacked",
    "TensorParallel": "hyperep_torch.styles",
    "TopKRouter": "hyperep_torch.layers",
    "clip_grad_norm_": "hyperep_torch.gradient_norm",
    "full_state_dict": "hyperep_torch.full_state",
    "fully_shard": "hyperep_torch.data_parallel",
    "grouped_matmul": "hyperep_torch.grouped",
    "grouped_swiglu": "hyperep_torch.swiglu",
    "init_weights": "hyperep_torch.initial",
    "load_full_state_dict": "hyperep_torch.load_full_state",
    "packed_swiglu": "hyperep_torch.packed",
    "parallelize_module": "hyperep_torch.styles",
    "shard_adapters": "hyperep_torch.adapters",
    "stack_experts": "hyperep_torch.stacked",
}

__all__ = [
    "ColwiseParallel",
    "ExpertParallel",
    "ExpertTensorParallel",
    "GradScaler",
    "GroupedExperts",
    "MoE",
    "RowwiseParallel",
    "StackedExperts",
    "TensorParallel",
    "TopKRouter",
    "clip_grad_norm_",
    "full_state_dict",
    "fully_shard",
    "grouped_matmul",
    "grouped_swiglu",
    "init_weights",
    "load_full_state_dict",
    "packed_swiglu",
    "parallelize_module",
    "shard_adapters",
    "stack_experts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hyperep_torch' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
