# SPDX-License-Identifier: Apache-2.0
"""The tensors of a model in training, whole and on the host, whatever the ranks that share them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from hyperep.platform.protocol import Platform
from hyperep.sharding import gather_tensor
from hyperep.train.optimizer import Moments
from hyperep.train.trainer import TrainState

__all__ = ["KINDS", "gather", "place"]

KINDS = ("model", "mean", "square")
"""The parameters, and the two moments that the optimizer keeps of each."""


def gather(platform: Platform[Any], state: TrainState) -> dict[str, dict[str, np.ndarray]]:
    """Whole tensors by kind and dotted path, on rank 0; empty on the others.

    Collective over the ranks that share the model; for a model that is whole there is no communication.
    """
    local = {name: platform.local(parameter) for name, parameter in state.parameters.items()}
    kinds = zip(KINDS, (local, state.moments.mean, state.moments.square), strict=True)
    return {kind: dict(_gathered(platform, state, tensors)) for kind, tensors in kinds}


def _gathered(
    platform: Platform[Any], state: TrainState, tensors: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """One tensor at a time, so that no more than one is whole on a device."""
    for name, local in tensors.items():
        sharding = platform.sharding(state.parameters[name])
        whole = platform.stop_gradient(local)
        whole = whole if sharding is None else gather_tensor(whole, sharding)
        if platform.rank == 0:
            yield name, np.ascontiguousarray(platform.to_host(whole)[0])


def place(
    platform: Platform[Any], state: TrainState, part: Callable[[str, str], np.ndarray], *, step: int, dtype: str
) -> TrainState:
    """Put tensors into a model, in place. No communication.

    Args:
        platform: of the model.
        state: whose tensors to replace.
        part: called with a kind and a path; returns this rank's part of that tensor.
        step: how many steps led to these tensors.
        dtype: to convert them to.

    Returns:
        The state after that step.
    """
    moments: dict[str, dict[str, Any]] = {"mean": {}, "square": {}}
    for name, parameter in state.parameters.items():
        value, mean, square = (platform.from_host(part(kind, name).astype(dtype)) for kind in KINDS)
        moments["mean"][name], moments["square"][name] = mean, square
        platform.assign(parameter, value)
    return replace(state, moments=Moments(**moments), step=step)
