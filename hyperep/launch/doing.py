# SPDX-License-Identifier: Apache-2.0
"""What a rank is about to do, told before it does it, so that it is known also if the rank dies of it.

It is written where the watcher can read it without asking: a rank that is dead, or hangs, answers no more.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["Doings", "doing", "telling"]

_tell: ContextVar[Callable[[str], None] | None] = ContextVar("hyperep_tell", default=None)


def doing(what: str) -> None:
    """Say that this rank is about to do *what*. Without anybody who watches it, this does nothing."""
    tell = _tell.get()
    if tell is not None:
        tell(what)


@contextmanager
def telling(tell: Callable[[str], None]) -> Iterator[None]:
    """Call *tell* with all that is said inside the block, in this thread."""
    token = _tell.set(tell)
    try:
        yield
    finally:
        _tell.reset(token)


class Doings:
    """What each rank said last, in a file that ranks write and their watcher reads; nobody waits for anybody.

    Args:
        descriptor: of the file, open for reading and writing.
    """

    _SIZE = 4096
    """Bytes for one rank."""
    _LENGTH = struct.Struct("=I")

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, position: int, what: str) -> None:
        """Let what the rank number *position* said be *what*, or as much of it as there is room for."""
        text = what.encode(errors="replace")[: self._SIZE - self._LENGTH.size]
        os.pwrite(self._descriptor, self._LENGTH.pack(len(text)) + text, position * self._SIZE)

    def read(self, position: int) -> str:
        """What the rank number *position* said last; empty if it said nothing."""
        data = os.pread(self._descriptor, self._SIZE, position * self._SIZE)
        if len(data) < self._LENGTH.size:
            return ""
        (length,) = self._LENGTH.unpack_from(data)
        return data[self._LENGTH.size : self._LENGTH.size + length].decode(errors="replace")
