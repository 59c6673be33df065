# SPDX-License-Identifier: Apache-2.0
"""Memory of a rank's arrays on the CPU: kept by the process once it has it.

A step frees what it needed, and the next one needs the same again. The C library gives large blocks back to the kernel
in between, and gets them again page by page, filled with zeros. Gradients of many experts are large (figures are in
docs/performance.md). Kept is what the main thread allocates, which is where a training step on the CPU runs; what a
process needed once, it holds until it ends.
"""

from __future__ import annotations

import ctypes
import os

__all__ = ["keep_memory"]

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Parameters of glibc's ``mallopt``, from ``malloc.h``."""

_CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")
"""Variables by which the user of a process says how glibc allocates."""


def keep_memory() -> None:
    """Let this process keep what it frees; before the first array is made.

    What the environment says goes first. Where the C library is not glibc, nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not any(name in os.environ for name in _CHOSEN):
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
