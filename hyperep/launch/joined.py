# SPDX-License-Identifier: Apache-2.0
"""The deadline of a step in a launch that somebody else made (torchrun, msrun, srun): each rank watches itself."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hyperep.launch.clock import RunningClock
from hyperep.launch.places import place_of_frame
from hyperep.launch.steps import LateRanks, counting_steps
from hyperep.launch.timeout import TIMEOUT_VARIABLE

__all__ = ["end_process", "watched_steps"]

_POLL = 0.5
_GRACE = 3.0
"""Seconds between the word of a rank that is late and its end: the launcher kills all others at the first end, and they
are to say first where they stand."""


@contextmanager
def watched_steps(rank: int, timeout: float) -> Iterator[None]:
    """End this process if this thread, inside the block, does no step for *timeout* seconds; say where it stood.

    Seconds in which the process is suspended do not count. The process ends without clean-up: its thread waits where no
    exception reaches it.
    """
    counter, steps, over = itertools.count(1), [0], threading.Event()

    def count() -> None:
        steps[0] = next(counter)

    watcher = threading.Thread(
        target=_watch,
        args=(rank, timeout, threading.get_ident(), lambda: steps[0], over),
        name="hyperep-steps",
        daemon=True,
    )
    watcher.start()
    try:
        with counting_steps(count):
            yield
    finally:
        over.set()
        watcher.join()


def _watch(rank: int, timeout: float, thread: int, steps: Callable[[], int], over: threading.Event) -> None:
    late = LateRanks(timeout, RunningClock())
    while not over.wait(_POLL):
        if late({rank: steps()}):
            frame = sys._current_frames().get(thread)
            whole = (
                "".join(traceback.format_stack(frame))
                if os.environ.get("HYPEREP_TRACEBACK", "0") not in ("", "0")
                else ""
            )
            end_process(
                f"hyperep: error: rank {rank} did no step for {timeout:g} s (--timeout or {TIMEOUT_VARIABLE} sets how "
                f"long one may take) after step {steps()}; it stands in {place_of_frame(frame)}\n{whole}",
                over,
            )
            return


def end_process(message: str, unless: threading.Event) -> None:
    """Write *message*, and end this process a moment later, *unless* that is set by then."""
    os.write(2, message.encode(errors="replace"))  # one write: ranks share the screen
    if not unless.wait(_GRACE):
        os._exit(1)
