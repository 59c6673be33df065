# SPDX-License-Identifier: Apache-2.0
"""Time in which this process could run. Who judges others by it does not judge them for its own sleep."""

from __future__ import annotations

import time

__all__ = ["RunningClock"]


class RunningClock:
    """Seconds since it was made, without those in which the process was suspended, or hardly got the processor.

    It has to be read often: of a longer gap between two readings only *gap* seconds count.
    """

    def __init__(self, gap: float = 2.0) -> None:
        self._gap = gap
        self._seconds = 0.0
        self._last = time.monotonic()

    def __call__(self) -> float:
        """The seconds so far."""
        now = time.monotonic()
        self._seconds += min(now - self._last, self._gap)
        self._last = now
        return self._seconds
