# SPDX-License-Identifier: Apache-2.0
"""When a layer's exchanges were on their way, and when a rank computed: what was hidden behind what.

A rank computes whenever it does not wait for an exchange. So two kinds of spans, seen from the host, tell all: an
exchange is on its way from its issue to the end of its wait, and a rank waits from the beginning to the end of that.
On a device whose host runs ahead they tell when the host did so, and not when the device did.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hyperep.bench.between import Between, Route
from hyperep.bench.counting import nbytes
from hyperep.platform.protocol import Platform

__all__ = ["Span", "Watch", "computing", "gather", "most_in_flight", "overlap_ms", "record"]


@dataclass(frozen=True)
class Span:
    """One exchange, in milliseconds from when forward began."""

    issued: float
    waited: float
    """When the rank began to wait for it."""
    arrived: float
    """When it could go on."""
    nbytes: int
    """Of what this rank received or sent, whichever is more."""


class Watch(Between):
    """Notes each exchange of a platform."""

    def __init__(self, platform: Platform[Any]) -> None:
        super().__init__(platform)
        self._begin = 0.0
        self.spans: list[Span] = []

    def start(self) -> None:
        """Forget what was noted; now is time zero."""
        self.spans = []
        self._begin = time.perf_counter()

    def now(self) -> float:
        """Milliseconds since the start."""
        return 1e3 * (time.perf_counter() - self._begin)

    def _exchange(self, x: Any, route: Route, async_op: bool) -> Any:
        issued = self.now()
        work = self._platform.all_to_all_single(x, *route, async_op)
        if async_op:
            return _WatchedWork(self, work, issued, nbytes(x))
        self.spans.append(Span(issued, issued, self.now(), max(nbytes(x), nbytes(work))))
        return work


class _WatchedWork:
    def __init__(self, watch: Watch, work: Any, issued: float, sent: int) -> None:
        self._watch, self._work, self._issued, self._sent = watch, work, issued, sent
        self._noted = False

    def wait(self) -> Any:
        waited = self._watch.now()
        arrived = self._work.wait()
        if not self._noted:
            span = Span(self._issued, waited, self._watch.now(), max(self._sent, nbytes(arrived)))
            self._watch.spans.append(span)
            self._noted = True
        return arrived


def record(watch: Watch, forward: Callable[[], Callable[[], Any]], wait: Callable[[Any], None]) -> tuple[float, float]:
    """Run *forward*, and the backward that it returns, from a common start; when each of them ended.

    Args:
        watch: what the layer was made with, as its platform.
        forward: of the layer.
        wait: returns when all tensors of a result are there.
    """
    watch.barrier()
    watch.start()
    backward = forward()
    middle = watch.now()
    wait(backward())
    return middle, watch.now()


def computing(spans: Sequence[Span], end: float) -> list[tuple[float, float]]:
    """When a rank did not wait, from zero to *end*."""
    found, begin = [], 0.0
    for span in sorted(spans, key=lambda span: span.waited):
        if span.waited > begin:
            found.append((begin, span.waited))
        begin = max(begin, span.arrived)
    return [*found, (begin, end)] if end > begin else found


def overlap_ms(spans: Sequence[Span], end: float) -> float:
    """For how long an exchange was issued and not waited for while the rank computed; it may have arrived sooner."""
    busy = computing(spans, end)
    edges = sorted(
        {0.0, end, *(t for span in spans for t in (span.issued, span.arrived)), *(t for b in busy for t in b)}
    )
    found = 0.0
    for begin, stop in itertools.pairwise(edges):
        middle = (begin + stop) / 2
        flying = any(span.issued <= middle <= span.arrived for span in spans)
        if flying and any(a <= middle <= b for a, b in busy):
            found += stop - begin
    return found


def most_in_flight(spans: Sequence[Span], end: float) -> int:
    """The most bytes that were on their way at a time while the rank computed."""
    times = [
        t for begin, stop in computing(spans, end) for t in (begin, *(s.issued for s in spans)) if begin <= t < stop
    ]
    return max((sum(s.nbytes for s in spans if s.issued <= t < s.arrived) for t in times), default=0)


def gather(platform: Platform[Any], spans: Sequence[Span], ends: tuple[float, float]) -> list[dict[str, Any]]:
    """What every rank noted; collective, and the same on all. All ranks have the same number of exchanges."""
    fields = [[s.issued, s.waited, s.arrived, s.nbytes] for s in spans]
    own = np.array([[*ends, 0, 0], *fields], dtype=np.float32)
    together = platform.to_host(platform.all_gather(platform.from_host(own)))[0].reshape(-1, *own.shape)
    return [
        {
            "rank": rank,
            "forward_ms": float(of[0, 0]),
            "end_ms": float(of[0, 1]),
            "exchanges": [
                {"issued_ms": float(a), "waited_ms": float(b), "arrived_ms": float(c), "bytes": int(d)}
                for a, b, c, d in of[1:]
            ],
        }
        for rank, of in enumerate(together)
    ]
