# SPDX-License-Identifier: Apache-2.0
"""Memory of a rank's tensors on the CPU: on huge pages, and kept by the process once it has it."""

from __future__ import annotations

import os

from hyperep.launch import host_memory

__all__ = ["keep_memory"]


def keep_memory() -> None:
    """Let this process keep what it frees, and PyTorch use huge pages; before the first tensor is made.

    What the environment says goes first. Where the C library is not glibc, only the huge pages remain.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch reads it at its first allocation
    host_memory.keep_memory()
