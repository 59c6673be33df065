# SPDX-License-Identifier: Apache-2.0
"""What a forward keeps for backward, and the most memory that a step holds at a time.

A framework knows best. A platform may have an attribute ``instruments``, which is no part of the protocol, with

* ``saved_bytes(function, parameters) -> int``: call *function* and return the bytes that it keeps for backward, each
  memory once, and that of the tensors *parameters* left out;
* ``peak_bytes(function) -> int``: call *function* and return by how much it raised the memory in use at most.

Without them, what is kept is known only where every gradient goes through ``custom_vjp``, and the peak is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from hyperep.bench.counting import nbytes
from hyperep.platform.base import PlatformBase
from hyperep.platform.protocol import Backward, Forward, Platform

__all__ = ["of_worst_rank", "peak_bytes", "saved_bytes"]

_DIFFERENTIABLE = (
    *("permute_rows", "sum_rows", "grouped_matmul", "swiglu", "grouped_swiglu", "differentiable_all_to_all_single"),
    *("copy_to_group", "reduce_from_group"),
)


def saved_bytes(platform: Platform[Any], function: Callable[[], Any], parameters: Sequence[Any]) -> int | None:
    """Bytes that *function* keeps for backward, beside the tensors *parameters*; ``None`` if nobody knows."""
    instruments = getattr(platform, "instruments", None)
    if instruments is not None:
        return int(instruments.saved_bytes(function, parameters))
    kind = type(platform)
    if any(getattr(kind, name, None) is not getattr(PlatformBase, name) for name in _DIFFERENTIABLE):
        return None
    with _residuals(platform) as kept:
        function()
    resident = {id(parameter) for parameter in parameters}
    return sum(nbytes(x) for identity, x in kept.items() if identity not in resident)


def peak_bytes(platform: Platform[Any], function: Callable[[], Any]) -> int | None:
    """By how much *function* raises the memory in use at most; ``None`` if nobody knows."""
    instruments = getattr(platform, "instruments", None)
    return None if instruments is None else int(instruments.peak_bytes(function))


def of_worst_rank(platform: Platform[Any], size: int | None) -> int | None:
    """The largest *size* of all ranks; ``None`` where nobody knows one. Collective."""
    known = platform.from_host(np.array([-1 if size is None else size], dtype=np.int64))
    (largest,) = platform.to_host(platform.all_reduce(known, op="max"))
    return int(largest[0]) if largest[0] >= 0 else None


@contextmanager
def _residuals(platform: Any) -> Iterator[dict[int, Any]]:
    """What custom functions keep inside the block, by identity."""
    kept: dict[int, Any] = {}
    original = platform.custom_vjp

    def noting(forward: Forward, backward: Backward) -> Callable[..., Any]:
        def noted(*inputs: Any) -> tuple[Any, tuple[Any, ...]]:
            outputs, residuals = forward(*inputs)
            kept.update({id(x): x for x in residuals})
            return outputs, residuals

        return original(noted, backward)

    platform.custom_vjp = noting
    try:
        yield kept
    finally:
        del platform.custom_vjp
