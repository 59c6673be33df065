# SPDX-License-Identifier: Apache-2.0
"""Leaving the process group when the program ends.

gloo's threads let go of the tensors of a collective a moment after the one who waits for it goes on, and for that they
need the interpreter's lock. A thread that asks for the lock of an interpreter that has begun to end is unwound by it,
in the middle of a destructor of C++, and the process dies: "terminate called without an active exception", SIGABRT,
with all results right. Destroying the group joins the threads only where nobody holds the group any more, and meshes,
platforms and programs do. So who leaves gives them the moment that they need.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch.distributed as dist

__all__ = ["leave", "settle"]

_THREADS = "pt_gloo_runloop"
_LOOK = 0.01
"""Seconds between two looks at the threads."""
_LOOKS = 3
"""Looks, one after the other, at which they all must be seen to sleep."""
_PATIENCE = 2.0
"""Seconds after which the process ends anyway: a thread that computes for so long is busy with something else."""


def leave() -> None:
    """Destroy the process group, unless the program has done so, and settle."""
    if dist.is_initialized():
        dist.destroy_process_group()
    settle()


def settle() -> None:
    """Let the threads of process groups let go of Python's objects; of groups that are destroyed as well."""
    end, calm = time.monotonic() + _PATIENCE, 0
    while calm < _LOOKS and time.monotonic() < end:
        time.sleep(_LOOK)  # without the lock
        calm = 0 if any(map(_runs, _tasks())) else calm + 1


def _tasks() -> list[Path]:
    try:
        return list(Path("/proc/self/task").iterdir())
    except FileNotFoundError:
        return []  # a system without /proc: three looks are all that there is


def _runs(task: Path) -> bool:
    """Whether the thread is one of gloo's, and has or wants a processor."""
    try:
        name, _, state = (task / "stat").read_text().partition("(")[2].rpartition(")")
    except (FileNotFoundError, ProcessLookupError):
        return False  # it has ended
    return name == _THREADS and state.split()[0] == "R"
