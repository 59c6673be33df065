# SPDX-License-Identifier: Apache-2.0
"""A call that the compiler does not look into; imported by what is being compiled, and by nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["call"]


@torch.compiler.disable
def call(inner: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Any:
    """What *inner* returns."""
    return inner(*inputs, **kwargs)
