# SPDX-License-Identifier: Apache-2.0
"""``Shown``: a finding with the input that shows it, for whoever writes a script of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hyperep.audit.examinations import Action

__all__ = ["Shown"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Shown:
    """What a script needs."""

    title: str
    reason: str
    ranks: int
    layers: int
    actions: tuple[Action, ...]
    tokens: Mapping[str, Sequence[np.ndarray]]
    """Batch -> the tokens ``[T, D]`` of each rank."""
    cotangents: Mapping[str, Sequence[np.ndarray]]
    seed: int
    """Of the weights; see :func:`hyperep.audit.inputs.weights_of`."""
