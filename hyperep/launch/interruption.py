# SPDX-License-Identifier: Apache-2.0
"""Signals that ask this process to end, as an exception: whoever has started something ends it on the way out."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupted", "interruptible"]


class Interrupted(BaseException):
    """A signal asked this process to end. Not an error: nothing that catches those may go on."""

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__("interrupted" if number == signal.SIGINT else f"ended by {name}")
        self.number = number

    @property
    def status(self) -> int:
        """The exit status, as shells count it."""
        return 128 + self.number


@contextmanager
def interruptible(numbers: Sequence[int]) -> Iterator[None]:
    """Raise :class:`Interrupted` inside the block when one of the signals *numbers* comes.

    Only where their handlers are those of Python: what the program has set up, or its parent has switched off, stays.
    Not for a rank, which waits inside its framework, where no handler of Python runs: it could be ended no more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = (signal.SIG_DFL, signal.default_int_handler)
    ours = {n: before for n in numbers if (before := signal.getsignal(n)) in usual}

    def interrupt(number: int, frame: FrameType | None) -> None:
        # The second time it is meant at once.
        for n in ours:
            signal.signal(n, signal.SIG_DFL)
        raise Interrupted(number)

    for n in ours:
        signal.signal(n, interrupt)
    try:
        yield
    finally:
        for n, before in ours.items():
            signal.signal(n, before)
