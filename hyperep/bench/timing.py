# SPDX-License-Identifier: Apache-2.0
"""Times of things that take turns, so that each of them meets the same load of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import numpy as np

from hyperep.launch import step_done
from hyperep.platform.protocol import Platform

__all__ = ["interleaved", "wait"]


Name = TypeVar("Name", bound=Hashable)


def interleaved(
    platform: Platform[Any],
    contestants: Mapping[Name, Callable[[], Any]],
    repetitions: int,
    warmup: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Name, np.ndarray]:
    """Milliseconds of each contestant at each repetition: of the slowest rank, from a common start.

    Collective over the world. A contestant returns what must be there before it counts as done. *progress* is called
    between repetitions with how many are done and how many there are, the warm-up among them.
    """
    order = list(contestants)
    times = np.zeros((repetitions, len(order)))
    for repetition in range(-warmup, repetitions):
        progress(warmup + repetition, warmup + repetitions)
        # Whoever comes first after a pause finds other caches; so the first place goes round.
        for place in np.roll(np.arange(len(order)), repetition):
            platform.barrier()
            begin = time.perf_counter()
            wait(platform, contestants[order[place]]())
            if repetition >= 0:
                times[repetition, place] = time.perf_counter() - begin
            step_done()
    progress(warmup + repetitions, warmup + repetitions)
    slowest = platform.to_host(platform.all_reduce(platform.from_host(times.astype(np.float32)), op="max"))[0]
    return {name: slowest[:, i].astype(np.float64) * 1e3 for i, name in enumerate(order)}


def wait(platform: Platform[Any], results: Any) -> None:
    """Return when all tensors in *results* are computed."""
    tensors = results if isinstance(results, tuple | list) else (results,)
    # A copy to the host ends after what it depends on; one row of each keeps the copy itself out of the time.
    platform.to_host(*(x[:1] for x in tensors))
