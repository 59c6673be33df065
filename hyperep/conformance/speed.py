# SPDX-License-Identifier: Apache-2.0
"""How long a call takes beside another one on the same platform: a ratio, which says the same on any machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from hyperep.conformance.case import Case
from hyperep.platform.base import PlatformBase

__all__ = ["SLOW", "compare_speed", "ratio"]

SLOW = 2.0
"""From this ratio on a default that is used is named, as what might be overridden."""
_ROUNDS = 5

Call = Callable[[], Sequence[Any]]
"""Does something, and returns the tensors that come of it."""


def ratio(what: Call, own: Call, finish: Callable[[Sequence[Any]], None], clock: Callable[[], float]) -> float:
    """Seconds of *what* over seconds of *own*: the best of a few rounds each, in turns, after one of each to warm up.

    Args:
        what: the call to be judged.
        own: what it is compared with.
        finish: waits until tensors are there; its own time counts.
        clock: seconds.
    """
    best = [math.inf, math.inf]
    for number in range(1 + _ROUNDS):
        for which, call in enumerate((what, own)):
            began = clock()
            finish(call())
            if number:
                best[which] = min(best[which], clock() - began)
    return best[0] / max(best[1], 1e-9)


def compare_speed(case: Case, what: Call, own: Call, words: str, members: Sequence[str]) -> None:
    """Measure *what* beside *own* and have the ratio told; *words* say what *own* is, *members* what is measured."""

    def finish(tensors: Sequence[Any]) -> None:
        case.platform.to_host(*(x[:1] for x in tensors))

    found = ratio(what, own, finish, time.perf_counter)
    defaults = [m for m in members if getattr(type(case.platform), m, None) is vars(PlatformBase)[m]]
    hint = ""
    if defaults and found >= SLOW:
        one = len(defaults) == 1
        hint = (
            f"; {' and '.join(defaults)} {'is' if one else 'are'} of PlatformBase, override {'it' if one else 'them'}"
        )
    case.measured(found, f"{found:.1f} times {words}{hint}")
