# SPDX-License-Identifier: Apache-2.0
"""In which way the layer that is measured exchanges its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hyperep.bench.shapes import Shape
from hyperep.exchange.balance import Balance, Placement
from hyperep.exchange.calibration import CHUNKS
from hyperep.styles import ExpertParallel
from hyperep.styles.expert import Exchange

__all__ = ["Way"]


@dataclass(frozen=True, kw_only=True)
class Way:
    """Settings of the style, and what is looked at besides times and bytes."""

    exchange: Exchange = "tokens"
    chunks: int | Literal["auto"] = 1
    """Parts in which tokens travel."""
    balance: bool = False
    """Whether hot experts are computed in several places, with the default settings of :class:`Balance`."""
    timeline: bool = False
    """Whether a run is written down, exchange by exchange."""

    @property
    def style(self) -> ExpertParallel:
        """The style."""
        return ExpertParallel(exchange=self.exchange, chunks=self.chunks, balance=Balance() if self.balance else None)

    def placement(self, shape: Shape, ranks: int) -> Placement | None:
        """Where the experts of *shape* are computed; ``None`` where that is at their owners."""
        balance = self.style.balance
        if balance is None or ranks == 1:
            return None
        worth = balance.worth(3 * shape.dim * shape.hidden, shape.dim)
        found = balance.plan(shape.counts(ranks).reshape(ranks, shape.experts), worth)
        return found if found.copies else None

    @property
    def counted(self) -> int:
        """Parts of which ranks tell each other the counts."""
        return CHUNKS[-1] if self.chunks == "auto" else self.chunks

    @property
    def waiting(self) -> Way:
        """The same without chunks: it waits for each of its exchanges."""
        return Way(exchange=self.exchange)
