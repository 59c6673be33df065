# SPDX-License-Identifier: Apache-2.0
"""What a check can learn of memory without knowing the framework: by writing to it, by weak references, by its size."""

from __future__ import annotations

import gc
import mmap
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from hyperep.conformance.case import Case

__all__ = ["freed", "keeps_growing", "kept_bytes", "overwrite", "too_many_anywhere", "watch"]

_TIMES = 6
"""How often memory must grow by too much. What is kept grows each time. What an allocator takes, because results were
under way in more threads at once than ever before, comes to an end: for eight ranks over gloo after two to four."""


def overwrite(tensor: Any, value: Any) -> bool:
    """Write *value*, a number or an array of its shape, into the memory of *tensor*; whether it can be written to."""
    try:
        tensor[...] = value
    except Exception:  # whatever a framework without assignment by index raises
        return False
    return True


def watch(tensor: Any) -> Callable[[], bool]:
    """What tells later whether *tensor* is still alive; never so if the framework allows no weak references."""
    try:
        alive = weakref.ref(tensor)
    except TypeError:
        return lambda: False
    return lambda: alive() is not None


def freed(alive: Callable[[], object]) -> bool:
    """Whether what *alive* tells of has gone, with the cycles that it may be part of.

    Several times, since a collection does nothing while another thread is at one.
    """
    for wait in (0.0, 0.0, 0.01, 0.05, 0.2):
        if not alive():
            return True
        time.sleep(wait)
        gc.collect()
    return not alive()


def kept_bytes(call: Callable[[int], Any], *, calls: int, barrier: Callable[[], Any], before: int = 6) -> int:
    """By how much the memory of this process has grown over so many calls of ``call(n)``, after some *before*.

    Zero where the system does not tell. The memory of a device of its own is not seen. *barrier* has all ranks wait for
    each other: they may be threads of this process, and none must be at work while another one measures.
    """

    def measured() -> int:
        gc.collect()
        barrier()
        size = _resident()
        barrier()
        return size

    # A framework's modules are hundreds of thousands of objects, through which each collection would go again.
    gc.freeze()
    try:
        for n in range(before):
            call(n)
        start = measured()
        for n in range(before, before + calls):
            call(n)
        return max(0, measured() - start)
    finally:
        gc.unfreeze()


def too_many_anywhere(case: Case, bytes_more: Sequence[int], allowed: int) -> list[bool]:
    """Which of *bytes_more* are *allowed* or more on any rank. Collective, so that all ranks go on together."""
    of_ranks = case.platform.all_to_all_single(case.tensor(np.tile(np.array(bytes_more), (case.ranks, 1))))
    return [bool(most >= allowed) for most in case.host(of_ranks).max(axis=0)]


def keeps_growing(case: Case, grown: Mapping[str, Callable[[], int]], allowed: int) -> dict[str, int]:
    """What grows by *allowed* bytes or more on this rank each time, with the least of them. Collective.

    Args:
        case: of the check.
        grown: by name, what measures growth once, as :func:`kept_bytes` does.
        allowed: bytes, the same on all ranks.
    """
    least, suspects = dict.fromkeys(grown, sys.maxsize), list(grown)
    for _ in range(_TIMES):
        if not suspects:
            break
        least |= {name: min(least[name], grown[name]()) for name in suspects}
        suspects = list(compress(suspects, too_many_anywhere(case, [least[name] for name in suspects], allowed)))
    return {name: least[name] for name in suspects if least[name] >= allowed}


def _resident() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * mmap.PAGESIZE if statm.exists() else 0
