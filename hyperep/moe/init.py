# SPDX-License-Identifier: Apache-2.0
"""Initial weights: from NumPy, so that one seed gives the same ones on every platform and any number of ranks.

=============================== ====================================================================================
seed                            initial weights
=============================== ====================================================================================
``7``                           those of this number; two modules of one number are alike
``(7, 3)``, ``(7, "layers.3")`` those of part 3, or of this name, of a model with the seed 7
a generator of NumPy            the next ones that it draws
left out                        ``(0, n)`` for the n-th module, from 0 on, that is made so with the platform object
=============================== ====================================================================================

Ranks that make the same modules in the same order give them the same weights, seeds or none. Ranks that make different
ones, as the stages of a pipeline do, say which: ``seed=(0, layer)`` is what a model in one piece gives its layers.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from hyperep.platform.protocol import Platform

__all__ = ["Seed", "generator", "uniform_fan_in"]

Seed = int | tuple[int | str, ...] | np.random.Generator

_made_without_seed: weakref.WeakKeyDictionary[Platform[Any], int] = weakref.WeakKeyDictionary()
"""How many modules each platform object has made; ranks that share a process have an object each."""


def generator(platform: Platform[Any], seed: Seed | None) -> np.random.Generator:
    """The generator that is given, or a new one from a seed, or where there is none from the next number.

    Raises:
        TypeError: *seed* is none of what the table above lists, or a number of it is negative.
    """
    if isinstance(seed, np.random.Generator):
        return seed
    if seed is None:
        number = _made_without_seed.get(platform, 0)
        _made_without_seed[platform] = number + 1
        seed = (0, number)
    first: Any
    first, *path = seed if isinstance(seed, tuple) and seed else (seed,)
    if not _is_number(first) or not all(_is_number(part) or isinstance(part, str) for part in path):
        raise TypeError(
            f"seed={seed!r}: give an int from 0 on, a tuple of such an int and of further ones or names, or a "
            "numpy.random.Generator"
        )
    # A key of its own for the path, because in NumPy the seeds 7 and [7, 0] are one.
    return np.random.default_rng(np.random.SeedSequence(int(first), spawn_key=tuple(map(_as_number, path))))


def _is_number(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 0


def _as_number(part: int | str) -> int:
    """A part of a path as a number; that of a name has more than 64 bits."""
    if isinstance(part, str):
        return 2**64 + int.from_bytes(hashlib.sha256(part.encode()).digest()[:8], "big")
    return int(part)


def uniform_fan_in(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """Float32 weights, uniform in ``+-1/sqrt(fan_in)``; the last dim is the input (what ``nn.Linear`` does)."""
    bound = 1.0 / np.sqrt(shape[-1])
    return rng.uniform(-bound, bound, size=tuple(shape)).astype(np.float32)
