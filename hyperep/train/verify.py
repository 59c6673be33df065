# SPDX-License-Identifier: Apache-2.0
"""``--verify``: each step is taken a second time, by the same model unsharded, from the same weights.

Two runs that are left to themselves part, though nothing is wrong: a router's choice is a jump, and where two experts
are nearly level rounding decides. So the unsharded model does not train on its own. It begins every step where the
sharded one began it, and two things are compared: the loss, and what the step changed, for the parameters and both
moments of the optimizer. The change of the first moment holds the gradient, scale and all, which the parameters alone
would hide, because Adam divides by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hyperep.platform.protocol import Platform
from hyperep.train import whole_state
from hyperep.train.precision import choose_dtype
from hyperep.train.settings import Settings
from hyperep.train.trainer import TrainState, new_state, train_step

__all__ = ["CHANGE_TOLERANCE", "LOSS_TOLERANCE", "Deviation", "Reference", "Verdict", "change_deviation"]

LOSS_TOLERANCE = 1e-4
"""Largest relative deviation of a step's loss."""
CHANGE_TOLERANCE: Mapping[str, float] = {"float64": 1e-4, "float32": 1e-1}
"""Largest relative deviation of what a step changed in a tensor. In float32 a token near a tie may go to another
expert, which by itself was seen to change the gradient of a tensor by up to 0.06 (docs/training.md)."""


@dataclass(frozen=True)
class Deviation:
    """The largest of its kind so far."""

    value: float = 0.0
    """Relative."""
    step: int = 0
    place: int = 0
    """Number of the tensor, in the order of :func:`_tensors`."""

    def or_larger(self, value: float, step: int, place: int = 0) -> Deviation:
        """This one, or the new one if it is larger; one that is no number counts as larger than any."""
        return (
            self
            if self.step and value <= self.value
            else Deviation(math.inf if math.isnan(value) else value, step, place)
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How far the sharded model was from the unsharded one."""

    loss: Deviation
    change: Deviation
    change_tolerance: float
    changed: str
    """The tensor of the largest deviation."""

    @property
    def passed(self) -> bool:
        """Whether every step was within the tolerances."""
        return self.loss.value <= LOSS_TOLERANCE and self.change.value <= self.change_tolerance

    def describe(self) -> str:
        """Two sentences."""
        outcome = "every step agrees with that" if self.passed else "steps DIFFER from those"
        return (
            f"{outcome} of the unsharded model from the same weights. Largest relative deviation of a "
            f"loss: {self.loss.value:.2e}, at step {self.loss.step} (allowed: {LOSS_TOLERANCE:g}); of what a step "
            f"changed in a tensor: {self.change.value:.2e}, at step {self.change.step} in {self.changed} "
            f"(allowed: {self.change_tolerance:g})"
        )


class Reference:
    """The unsharded model, on rank 0 alone; on the other ranks, nothing. Making one is collective.

    It takes its step between two steps of the sharded model, so that the other ranks never wait for longer than one.
    """

    def __init__(self, platform: Platform[Any], settings: Settings, state: TrainState) -> None:
        self._platform, self._settings = platform, settings
        self._dtype = choose_dtype(platform, settings.dtype)
        self._loss = self._change = Deviation()
        self._tensors = _tensors(state)
        self._begin = whole_state.gather(platform, state)
        self._state = new_state(platform, settings, unsharded=True) if platform.rank == 0 else None

    def step(self, batch: np.ndarray, state: TrainState, loss: float) -> float | None:
        """Take the step again that led to *state*, on *batch* and with *loss*. Collective.

        Returns:
            The loss of the unsharded model, on rank 0.
        """
        platform = self._platform
        end = whole_state.gather(platform, state)
        if self._state is None:
            return None
        begin, step = self._begin, state.step
        own = whole_state.place(
            platform, self._state, lambda kind, name: begin[kind][name], step=step - 1, dtype=self._dtype
        )
        own, result = train_step(platform, self._settings, own, batch)
        own_end = whole_state.gather(platform, own)
        self._loss = self._loss.or_larger(abs(loss - result.loss) / abs(result.loss), step)
        for place, (kind, name) in enumerate(self._tensors):
            deviation = change_deviation(begin[kind][name], end[kind][name], own_end[kind][name])
            self._change = self._change.or_larger(deviation, step, place)
        self._state, self._begin = own, end
        return result.loss

    def agree(self) -> Verdict:
        """Rank 0's verdict, on every rank. Collective."""
        found = [self._loss.value, self._loss.step, self._change.value, self._change.step, self._change.place]
        mine = self._platform.from_host(np.array(found, np.float32))
        loss, loss_step, change, change_step, place = self._platform.to_host(self._platform.broadcast(mine, 0))[
            0
        ].tolist()
        kind, name = self._tensors[int(place)]
        return Verdict(
            loss=Deviation(loss, int(loss_step)),
            change=Deviation(change, int(change_step), int(place)),
            change_tolerance=CHANGE_TOLERANCE[self._dtype],
            changed=name if kind == "model" else f"the {kind} of {name}",
        )


def _tensors(state: TrainState) -> list[tuple[str, str]]:
    """Kind and path of every tensor that a step changes."""
    return [(kind, name) for name in state.parameters for kind in whole_state.KINDS]


def change_deviation(begin: np.ndarray, end: np.ndarray, reference: np.ndarray) -> float:
    """How far ``end - begin`` is from ``reference - begin``, relative to the latter, in the Euclidean norm."""
    begin, end, reference = (x.astype(np.float64) for x in (begin, end, reference))
    difference, change = float(np.linalg.norm(end - reference)), float(np.linalg.norm(reference - begin))
    return difference / change if change else (math.inf if difference else 0.0)
