# SPDX-License-Identifier: Apache-2.0
"""``--verify``: the same model, unsharded, trained beside the sharded one on the same data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hyperep.platform.protocol import Platform
from hyperep.train import checkpoint
from hyperep.train.precision import choose_dtype
from hyperep.train.settings import Settings
from hyperep.train.trainer import new_state, train_step

__all__ = ["TOLERANCE", "Reference", "Verdict", "agree"]

TOLERANCE = 1e-4
"""Largest relative deviation of a step's loss."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How far the losses were apart."""

    largest_deviation: float
    """Relative; of the step where it was largest."""
    step: int

    @property
    def passed(self) -> bool:
        """Whether every step was within the tolerance."""
        return self.largest_deviation <= TOLERANCE

    def describe(self) -> str:
        """One sentence."""
        outcome = "agree with" if self.passed else "DIFFER from"
        return (
            f"losses {outcome} those of the unsharded model: largest relative deviation {self.largest_deviation:.2e}, "
            f"at step {self.step} (allowed: {TOLERANCE:g})"
        )


class Reference:
    """An unsharded model in training, on rank 0 alone; on the other ranks, nothing.

    It takes its step between two steps of the sharded model, so that the other ranks never wait for longer than one.
    """

    def __init__(self, platform: Platform[Any], settings: Settings, resume: checkpoint.Manifest | None) -> None:
        self._platform, self._settings = platform, settings
        self._state = new_state(platform, settings, unsharded=True) if platform.rank == 0 else None
        if self._state is not None and resume is not None:
            self._state = checkpoint.load(resume, platform, self._state, choose_dtype(platform, settings.dtype))
        self._worst = Verdict(largest_deviation=0.0, step=0)

    def step(self, batch: np.ndarray, loss: float) -> float | None:
        """Train on the batch that gave the sharded model *loss*; return the loss here, or ``None`` on other ranks."""
        if self._state is None:
            return None
        self._state, result = train_step(self._platform, self._settings, self._state, batch)
        deviation = abs(loss - result.loss) / abs(result.loss)
        # Written so that a deviation that is no number counts as the worst.
        if not deviation <= self._worst.largest_deviation or self._state.step == 1:
            self._worst = Verdict(largest_deviation=deviation, step=self._state.step)
        return result.loss


def agree(platform: Platform[Any], reference: Reference) -> Verdict:
    """Rank 0's verdict, on every rank. Collective."""
    worst = reference._worst
    mine = platform.from_host(np.array([worst.largest_deviation, worst.step], np.float32))
    deviation, step = platform.to_host(platform.broadcast(mine, 0))[0].tolist()
    return Verdict(largest_deviation=deviation, step=int(step))
