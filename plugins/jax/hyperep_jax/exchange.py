# SPDX-License-Identifier: Apache-2.0
"""The one collective that everything here is made of: an all-gather of bytes between processes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

__all__ = ["gather"]

_SMALLEST = 256
"""Bytes. Lengths are rounded up to powers of two from here, so that XLA compiles few programs."""


def gather(array: np.ndarray, ranks: Sequence[int]) -> list[np.ndarray]:
    """The arrays of the processes *ranks*, which all have one shape and dtype, in that order.

    Args:
        array: this process's.
        ranks: process numbers; this process is one of them.
    """
    if len(ranks) == 1:
        return [array]
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    size = max(_SMALLEST, 1 << max(0, data.size - 1).bit_length())
    padded = np.zeros((1, size), np.uint8)
    padded[0, : data.size] = data
    sharding, replicate = _program(tuple(ranks))
    whole = replicate(jax.make_array_from_process_local_data(sharding, padded, (len(ranks), size)))
    received = np.asarray(whole.addressable_data(0))
    return [np.array(row[: data.size]).view(array.dtype).reshape(array.shape) for row in received]


@functools.cache
def _program(ranks: tuple[int, ...]) -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """How a row lies on each device, and the function that brings all rows to all; always the same, traced once."""
    devices = [next(d for d in jax.devices() if d.process_index == rank) for rank in ranks]
    mesh = Mesh(np.array(devices), ("ranks",))
    return NamedSharding(mesh, PartitionSpec("ranks")), jax.jit(
        lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec())
    )
