# SPDX-License-Identifier: Apache-2.0
"""``--verify``: each step is taken a second time, by the same model unsharded, from the same weights.

Two runs that are left to themselves part, though nothing is wrong: a router's choice is a jump, and where two experts
are nearly level rounding decides. So the unsharded model does not train on its own. It begins every step where the
sharded one began it, and three things are compared: the loss; the norm of the whole gradient before it is clipped; and
what the step changed, in the parameters and both moments of the optimizer. Each sees what the others may hide: clipping
divides away a scale that all gradients share, and AdamW one that a parameter's gradient has to itself, which its first
moment still shows.

The cost of a step, besides the step itself: every parameter and both moments are gathered and copied to rank 0's host.
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
from hyperep.train.trainer import StepResult, TrainState, new_state, train_step

__all__ = ["CHANGE_TOLERANCE", "LOSS_TOLERANCE", "Deviation", "Reference", "Verdict", "change_deviation"]

LOSS_TOLERANCE = 1e-4
"""Largest relative deviation of a step's loss."""
CHANGE_TOLERANCE: Mapping[str, float] = {"float64": 1e-4, "float32": 1e-1}
"""Largest relative deviation of the gradient's norm, and of what a step changed in a tensor. In float32 a token near a
tie may go to another expert, which alone was seen to change a tensor's gradient by up to 0.06 (docs/training.md)."""


@dataclass(frozen=True)
class Deviation:
    """The largest of its kind so far."""

    value: float = 0.0
    """Relative."""
    step: int = 0
    tensor: int = 0
    """Its number, in the order of :func:`_tensors`."""

    def or_larger(self, value: float, step: int, tensor: int = 0) -> Deviation:
        """This one, or the new one if it is larger; one that is no number counts as larger than any."""
        if self.step and value <= self.value:
            return self
        return Deviation(math.inf if math.isnan(value) else value, step, tensor)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How far the sharded model was from the unsharded one."""

    loss: Deviation
    norm: Deviation
    change: Deviation
    changed: str
    """The tensor of the largest deviation."""
    tolerance: float
    """For the norm and the changes."""

    @property
    def passed(self) -> bool:
        """Whether there were steps, and every one was within the tolerances."""
        within = self.loss.value <= LOSS_TOLERANCE and max(self.norm.value, self.change.value) <= self.tolerance
        return self.loss.step > 0 and within

    def describe(self) -> str:
        """One or two sentences."""
        if not self.loss.step:
            return "nothing was verified: no step was taken"
        outcome = "every step agrees with that" if self.passed else "steps DIFFER from those"
        return (
            f"{outcome} of the unsharded model from the same weights. Largest relative deviations: of a loss "
            f"{self.loss.value:.2e}, at step {self.loss.step} (allowed: {LOSS_TOLERANCE:g}); of the gradient's norm "
            f"{self.norm.value:.2e}, at step {self.norm.step}, and of what a step changed in a tensor "
            f"{self.change.value:.2e}, at step {self.change.step} in {self.changed} (allowed: {self.tolerance:g})"
        )


class Reference:
    """The unsharded model, on rank 0 alone; on the other ranks, nothing. Making one is collective.

    It takes its step between two steps of the sharded model, so that the other ranks never wait for longer than one.
    """

    def __init__(self, platform: Platform[Any], settings: Settings, state: TrainState) -> None:
        self._platform, self._settings = platform, settings
        self._dtype = choose_dtype(platform, settings.dtype)
        self._loss = self._norm = self._change = Deviation()
        self._tensors = _tensors(state)
        self._begin = whole_state.gather(platform, state)
        self._state = new_state(platform, settings, unsharded=True) if platform.rank == 0 else None

    def step(self, batch: np.ndarray, state: TrainState, result: StepResult) -> float | None:
        """Take the step again that led to *state* and *result* on *batch*. Collective.

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
        own, own_result = train_step(platform, self._settings, own, batch)
        own_end = whole_state.gather(platform, own)
        self._loss = self._loss.or_larger(_relative(result.loss, own_result.loss), step)
        self._norm = self._norm.or_larger(_relative(result.gradient_norm, own_result.gradient_norm), step)
        for number, (kind, name) in enumerate(self._tensors):
            deviation = change_deviation(begin[kind][name], end[kind][name], own_end[kind][name])
            self._change = self._change.or_larger(deviation, step, number)
        self._state, self._begin = own, end
        return own_result.loss

    def agree(self) -> Verdict:
        """Rank 0's verdict, on every rank. Collective."""
        deviations = (self._loss, self._norm, self._change)
        mine = np.array([[d.value, d.step, d.tensor] for d in deviations], np.float32)
        (found,) = self._platform.to_host(self._platform.broadcast(self._platform.from_host(mine), 0))
        loss, norm, change = (Deviation(float(value), int(step), int(number)) for value, step, number in found)
        kind, name = self._tensors[change.tensor]
        return Verdict(
            loss=loss,
            norm=norm,
            change=change,
            changed=name if kind == "model" else f"the {kind} of {name}",
            tolerance=CHANGE_TOLERANCE[self._dtype],
        )


def _relative(value: float, reference: float) -> float:
    return abs(value - reference) / abs(reference) if reference else abs(value - reference)


def _tensors(state: TrainState) -> list[tuple[str, str]]:
    """Kind and path of every tensor that a step changes."""
    return [(kind, name) for name in state.parameters for kind in whole_state.KINDS]


def change_deviation(begin: np.ndarray, end: np.ndarray, reference: np.ndarray) -> float:
    """How far ``end - begin`` is from ``reference - begin``, relative to the latter, in the Euclidean norm."""
    begin, end, reference = (x.astype(np.float64) for x in (begin, end, reference))
    difference, change = float(np.linalg.norm(end - reference)), float(np.linalg.norm(reference - begin))
    return difference / change if change else (math.inf if difference else 0.0)
