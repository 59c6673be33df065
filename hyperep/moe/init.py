# SPDX-License-Identifier: Apache-2.0
"""Initial weights: from NumPy, so that one seed gives the same ones on every platform and any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["Seed", "generator", "uniform_fan_in"]

Seed = int | np.random.Generator


def generator(seed: Seed) -> np.random.Generator:
    """The generator itself, or a new one from a seed."""
    return seed if isinstance(seed, np.random.Generator) else np.random.default_rng(seed)


def uniform_fan_in(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """Float32 weights, uniform in ``+-1/sqrt(fan_in)``; the last dim is the input (what ``nn.Linear`` does)."""
    bound = 1.0 / np.sqrt(shape[-1])
    return rng.uniform(-bound, bound, size=tuple(shape)).astype(np.float32)
