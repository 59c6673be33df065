# SPDX-License-Identifier: Apache-2.0
"""AdamW (arXiv:1711.05101) on each rank's own part of the parameters, in the array subset alone.

``EPSILON`` is far above the usual 1e-8. An element whose gradient is nothing but rounding would otherwise move at the
full learning rate, in a direction that differs with the number of ranks and the platform. Gradients come clipped to a
norm of about one, so this is small beside those that matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hyperep.platform.protocol import Parameter, Platform

__all__ = ["EPSILON", "Moments", "learning_rate", "start", "update"]

BETA1, BETA2 = 0.9, 0.95
EPSILON = 1e-5


@dataclass(frozen=True, eq=False)
class Moments:
    """The optimizer's state: tensors like this rank's part of each parameter, by the parameter's path."""

    mean: Mapping[str, Any]
    """Running mean of the gradient."""
    square: Mapping[str, Any]
    """Running mean of its square."""


def start(platform: Platform[Any], parameters: Mapping[str, Parameter]) -> Moments:
    """The state before the first step."""

    def zeros() -> dict[str, Any]:
        return {n: platform.xp.zeros_like(platform.stop_gradient(platform.local(p))) for n, p in parameters.items()}

    return Moments(zeros(), zeros())


def learning_rate(step: int, *, lr: float, warmup_steps: int) -> float:
    """The rate of a step, counted from 1: a linear warm-up, then constant."""
    return lr * min(1.0, step / max(warmup_steps, 1))


def update(
    platform: Platform[Any],
    parameters: Mapping[str, Parameter],
    gradients: Mapping[str, Any],
    moments: Moments,
    *,
    step: int,
    rate: float,
    weight_decay: float,
) -> Moments:
    """Move every parameter by one step, in place, and return the new state. No communication.

    Args:
        platform: of the parameters.
        parameters: by path.
        gradients: of the local parts, summed over ranks and clipped.
        moments: the state after the step before.
        step: counted from 1.
        rate: the learning rate of this step.
        weight_decay: applied to matrices; scales of norms are left alone.
    """
    xp = platform.xp
    mean, square = dict(moments.mean), dict(moments.square)
    for name, parameter in parameters.items():
        gradient, value = gradients[name], platform.stop_gradient(platform.local(parameter))
        mean[name] = BETA1 * mean[name] + (1.0 - BETA1) * gradient
        square[name] = BETA2 * square[name] + (1.0 - BETA2) * gradient * gradient
        denominator = xp.sqrt(square[name] * (1.0 / (1.0 - BETA2**step))) + EPSILON
        decay = weight_decay if value.ndim > 1 else 0.0
        value = value * (1.0 - rate * decay) - (rate / (1.0 - BETA1**step)) * (mean[name] / denominator)
        platform.assign(parameter, value)
    return Moments(mean, square)
