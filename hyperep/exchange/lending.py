# SPDX-License-Identifier: Apache-2.0
"""Weights of experts that are lent to other ranks for one step, and their gradients, which come home."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from hyperep.exchange.balance import Placement
from hyperep.platform.protocol import Group, Platform

__all__ = ["Lending", "plan_lending"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Lending:
    """Which of this rank's experts are sent where."""

    platform: Platform[Any]
    group: Group
    lent: Any
    """int64 ``[n]``: each expert that is sent, from this rank's first one on; once for each copy, by rank."""
    place: Any
    """int64 ``[L, C]``: which of these are of each expert; ``n`` or more for none."""
    entry: Any
    """int64 ``[n]``: where that is, flat."""
    lent_splits: tuple[int, ...]
    borrowed_splits: tuple[int, ...]

    def lend(self, weight: Any) -> Any:
        """This rank's part of a parameter, ``[L, ...]``, to those of the copies that it has, ``[S, ...]``."""
        rows = self.platform.xp.take(self._flat(weight), self.lent, axis=0)
        return self._shaped(self._exchange(rows, self.borrowed_splits, self.lent_splits), weight)

    def bring_home(self, gradient: Any) -> Any:
        """Gradients of copies, ``[S, ...]``, to the sums for this rank's experts, ``[L, ...]``, in float32 at least.

        They are added rank by rank: the same bits from run to run.
        """
        rows = self._exchange(self._flat(gradient), self.lent_splits, self.borrowed_splits)
        return self._shaped(self.platform.sum_rows(rows, self.place, self.entry), gradient)

    def _exchange(self, rows: Any, output_splits: tuple[int, ...], input_splits: tuple[int, ...]) -> Any:
        return self.platform.all_to_all_single(rows, output_splits, input_splits, self.group)

    def _flat(self, x: Any) -> Any:
        return self.platform.xp.reshape(x, (x.shape[0], math.prod(x.shape[1:])))

    def _shaped(self, rows: Any, like: Any) -> Any:
        return self.platform.xp.reshape(rows, (rows.shape[0], *like.shape[1:]))


def plan_lending(platform: Platform[Any], group: Group, placement: Placement, rank: int) -> Lending:
    """What *rank*, its number in the *group*, sends and gets by a *placement*."""
    lent, splits = placement.sent(rank)
    copies = [lent.count(expert) for expert in range(placement.owned)]
    most = max([*copies, 1])
    place = np.full((placement.owned, most), len(lent), dtype=np.int64)
    entry = np.zeros(len(lent), dtype=np.int64)
    filled = [0] * placement.owned
    for number, expert in enumerate(lent):
        place[expert, filled[expert]] = number
        entry[number] = expert * most + filled[expert]
        filled[expert] += 1
    return Lending(
        platform=platform,
        group=group,
        lent=platform.from_host(np.array(lent, dtype=np.int64)),
        place=platform.from_host(place),
        entry=platform.from_host(entry),
        lent_splits=tuple(splits),
        borrowed_splits=tuple(placement.received(rank)),
    )
