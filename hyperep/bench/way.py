# SPDX-License-Identifier: Apache-2.0
"""In which way the layer that is measured exchanges its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    timeline: bool = False
    """Whether a run is written down, exchange by exchange."""

    @property
    def style(self) -> ExpertParallel:
        """The style."""
        return ExpertParallel(exchange=self.exchange, chunks=self.chunks)

    @property
    def counted(self) -> int:
        """Parts of which ranks tell each other the counts."""
        return CHUNKS[-1] if self.chunks == "auto" else self.chunks

    @property
    def waiting(self) -> Way:
        """The same without chunks: it waits for each of its exchanges."""
        return Way(exchange=self.exchange)
