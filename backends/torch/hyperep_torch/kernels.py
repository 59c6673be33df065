# SPDX-License-Identifier: Apache-2.0
"""Whether, and from where, Triton kernels are used. Triton itself is imported at the first use on a CUDA tensor."""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch

__all__ = ["load", "usable"]


def usable(x: torch.Tensor) -> bool:
    """Whether the Triton kernels take *x*."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32) and _installed()


@functools.cache
def load() -> ModuleType:
    """The module of the kernels."""
    from hyperep_torch import triton_kernels

    return triton_kernels


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
