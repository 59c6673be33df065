# SPDX-License-Identifier: Apache-2.0
"""What one rank finds wrong is an error on every rank: none is left waiting for one that has gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from hyperep.platform.protocol import Platform

__all__ = ["agreed"]

T = TypeVar("T")

_LONGEST = 400
"""Bytes of a message that reach the other ranks."""


def agreed(platform: Platform[Any], function: Callable[[], T]) -> T:
    """Call *function* on this rank and return its result, if it raises on no rank. Collective over the world.

    Raises:
        ValueError, OSError: this rank's own error; or a ``ValueError`` with the message of the first rank that met one.
    """
    result: Any = None
    own: ValueError | OSError | None = None
    try:
        result = function()
    except (ValueError, OSError) as error:
        own = error
    said = np.zeros(1 + _LONGEST, np.int64)  # whether there is an error, and its message byte by byte
    if own is not None:
        message = str(own).encode()[:_LONGEST]
        said[0], said[1 : 1 + len(message)] = 1, list(message)
    (heard,) = platform.to_host(platform.all_gather(platform.from_host(said)))
    if own is not None:
        raise own
    for rank, (failed, *letters) in enumerate(heard.reshape(-1, 1 + _LONGEST).tolist()):
        if failed:
            raise ValueError(f"on rank {rank}: {bytes(filter(None, letters)).decode(errors='ignore')}")
    return result
