# SPDX-License-Identifier: Apache-2.0
"""A process that must not outlive the one that started it.

Two ways, because each has a hole: the kernel's parent-death signal works even while the process is stuck in native
code, but exists on Linux only and reaches no grandchildren; the end of the channel to the parent works everywhere, but
needs a thread that runs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

__all__ = ["become", "die_with_parent", "end_process_group"]

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread of process *parent* that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent may have gone before the kernel was told; then this process already belongs to somebody else.
    if os.getppid() != parent:
        os._exit(1)


def end_process_group() -> None:
    """Kill this process and all that it started, without any clean-up: nobody is left to wait for it."""
    os.killpg(os.getpgid(0), signal.SIGKILL)


def become(parent: int, command: Sequence[str]) -> None:
    """Replace this process by *command*, which then dies with process *parent*."""
    die_with_parent(parent)
    os.execvp(command[0], list(command))  # the parent-death signal survives exec
