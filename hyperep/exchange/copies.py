# SPDX-License-Identifier: Apache-2.0
"""Which tokens are sent to which ranks: once to each rank that owns one of a token's experts.

With ``R`` ranks that own ``L`` experts each, the copies of a rank's tokens are numbered rank-major and within a rank by
token. Three tokens, two ranks with two experts each, ``N`` for nobody::

    choices          choices_by_rank       copies, as they are sent
    t0: 0 1          rank 0: 2 0 1         0: t0 to rank 0      index of t0: 0 N     P = 4
    t1: 2 3          rank 1: 0 2 1         1: t2 to rank 0               t1: N 2
    t2: 3 0                                2: t1 to rank 1               t2: 1 3
                                           3: t2 to rank 1

All of it is gathers, sums and searches on the device; only the number of copies for each rank comes from the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hyperep.platform.protocol import Platform

__all__ = ["Copies", "choices_by_rank", "own_choices", "plan_copies"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Copies:
    """Where the ``P`` copies of ``T`` tokens stand among those that are sent."""

    token: Any
    """int64 ``[P]``: of which token each is one."""
    index: Any
    """int64 ``[T, R]``: which one is for each rank; ``P`` or more if none is."""
    entry: Any
    """int64 ``[P]``: where that is, ``token * R + rank``."""


def choices_by_rank(platform: Platform[Any], indices: Any, ranks: int, local: int) -> Any:
    """How many of each token's choices each rank owns: integers ``[T, K]`` to int64 ``[R, T]``.

    Rank ``r`` owns ``r * L`` up to ``(r + 1) * L``; ``R * L`` and more is nobody.
    """
    xp = platform.xp
    starts = xp.reshape(platform.arange(0, (ranks + 1) * local, local, dtype=indices.dtype), (ranks + 1, 1, 1))
    from_start = xp.sum(xp.astype(indices >= starts, xp.int64), axis=2)  # [R + 1, T]
    return from_start[:-1] - from_start[1:]


def plan_copies(platform: Platform[Any], by_rank: Any, splits: tuple[int, ...]) -> Copies:
    """The copies for choices *by_rank*, int64 ``[R, T]``, of which *splits* says how many go to each rank."""
    xp = platform.xp
    ranks, tokens = by_rank.shape
    total = sum(splits)
    sent = by_rank > 0
    # How many copies there are up to each pair of a rank and a token, so that copy i is where i + 1 is reached first.
    reached = xp.cumulative_sum(xp.reshape(xp.astype(sent, xp.int64), (ranks * tokens,)))
    pair = xp.searchsorted(reached, platform.arange(1, total + 1))
    rank = np.repeat(np.arange(ranks, dtype=np.int64), splits)
    first, rank = (platform.from_host(x) for x in (rank * tokens, rank))
    token = xp.astype(pair, xp.int64) - first
    number = xp.reshape(reached - 1, (ranks, tokens))
    index = xp.where(sent, number, xp.full((ranks, tokens), total, dtype=xp.int64))
    return Copies(token=token, index=xp.permute_dims(index, (1, 0)), entry=token * ranks + rank)


def own_choices(platform: Platform[Any], numbers: Any, first: int, local: int) -> Any:
    """Renumber choices from *first* on as ``0 .. L - 1``, and all others as nobody, ``L``; integers ``[P, K]``."""
    xp = platform.xp
    numbers = numbers - first
    nobody = xp.full(numbers.shape, local, dtype=numbers.dtype)
    return xp.where(numbers < 0, nobody, xp.minimum(numbers, nobody))
