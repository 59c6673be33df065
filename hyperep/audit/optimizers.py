# SPDX-License-Identifier: Apache-2.0
"""Optimizers in NumPy, for what weights should be after a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hyperep.audit.subject import NotOffered

__all__ = ["Moments", "optimizer_step"]


@dataclass(kw_only=True, eq=False)
class Moments:
    """What an optimizer remembers."""

    first: dict[str, np.ndarray] = field(default_factory=dict)
    second: dict[str, np.ndarray] = field(default_factory=dict)
    steps: int = 0


def optimizer_step(
    optimizer: Mapping[str, Any], weights: Mapping[str, np.ndarray], gradients: Mapping[str, np.ndarray], old: Moments
) -> tuple[dict[str, np.ndarray], Moments]:
    """New weights and moments; the arguments stay as they are.

    Raises:
        NotOffered: the optimizer is none that is known here.
    """
    name, lr = optimizer.get("name"), float(optimizer.get("lr", 0.0))
    decay = float(optimizer.get("weight_decay", 0.0))
    new = Moments(steps=old.steps + 1)
    moved: dict[str, np.ndarray] = {}
    if name == "sgd":
        momentum = float(optimizer.get("momentum", 0.0))
        for key, weight in weights.items():
            gradient = gradients[key] + decay * weight
            new.first[key] = momentum * old.first[key] + gradient if key in old.first else gradient
            moved[key] = weight - lr * new.first[key]
        return moved, new
    if name != "adamw":
        raise NotOffered(f"an optimizer of the name {name!r} is not known; 'adamw' and 'sgd' are")
    b1, b2 = optimizer.get("betas", (0.9, 0.999))
    eps = float(optimizer.get("eps", 1e-8))
    for key, weight in weights.items():
        gradient = gradients[key]
        new.first[key] = b1 * old.first.get(key, 0.0) + (1 - b1) * gradient
        new.second[key] = b2 * old.second.get(key, 0.0) + (1 - b2) * gradient**2
        first = new.first[key] / (1 - b1**new.steps)
        second = new.second[key] / (1 - b2**new.steps)
        moved[key] = weight * (1 - lr * decay) - lr * first / (np.sqrt(second) + eps)
    return moved, new
