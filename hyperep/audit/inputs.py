# SPDX-License-Identifier: Apache-2.0
"""Weights and tokens of an examination: numbers of size one, and a routing that is chosen and not left to chance.

The router's rows are orthogonal, so that a token with any wanted logits can be made: what lies in their span decides
where it goes, the rest is random. The layer routes by itself; nothing in it has to be replaced.

All numbers have eight significant bits, so that bfloat16 holds them exactly and its layers are judged by what they
compute alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from hyperep.audit.claims import Claims

__all__ = ["coarse", "cotangent_like", "tokens_for", "weights_for", "weights_of"]

_CHOSEN, _STEP, _SPREAD = 1.6, 0.4, 0.1
"""The logit of the first choice, how much less each further one has, and half of what chance adds. Others are below
zero, so that no rounding changes a choice."""


def coarse(x: np.ndarray) -> np.ndarray:
    """Rounded to eight significant bits; float64."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 256) / 256, exponent)


def weights_for(claims: Claims, seed: int) -> dict[str, np.ndarray]:
    """Every weight, whole, by its name."""
    return weights_of(claims.shapes, seed)


def weights_of(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """The same for weights of these names and shapes."""
    rng = np.random.default_rng([seed, zlib.crc32(b"weights")])
    found = {}
    for name, shape in shapes.items():
        if name == "router":
            orthogonal = np.linalg.qr(rng.normal(size=(shape[1], shape[0])))[0].T  # [E, D]
            found[name] = coarse(orthogonal * rng.uniform(0.8, 1.2, size=(shape[0], 1)))
        else:
            bias = len(shape) == (1 if name.startswith("shared_") else 2)
            found[name] = coarse(rng.normal(size=shape) * (0.5 if bias else 1.5 / np.sqrt(shape[-1])))
    return found


def tokens_for(choices: np.ndarray, router: np.ndarray, label: str, seed: int) -> np.ndarray:
    """Tokens ``[T, D]`` that choose ``choices [T, K]`` (distinct experts, the best first)."""
    tokens, (experts, dim) = len(choices), router.shape
    rng = _generator(label, seed)
    logits = rng.uniform(-1.0, -0.1, size=(tokens, experts))
    step = min(_STEP, 1.2 / max(1, choices.shape[1] - 1))
    wanted = _CHOSEN - step * np.arange(choices.shape[1]) + rng.uniform(-_SPREAD, _SPREAD, size=choices.shape)
    np.put_along_axis(logits, choices, wanted, axis=1)
    inverse = np.linalg.pinv(router)  # [D, E]
    rest = rng.normal(size=(tokens, dim))
    return coarse(logits @ inverse.T + rest - (rest @ router.T) @ inverse.T)


def cotangent_like(tokens: np.ndarray, label: str, seed: int) -> np.ndarray:
    """The gradient of the loss with respect to the output, ``[T, D]``."""
    return coarse(_generator("cotangent " + label, seed).normal(size=tokens.shape))


def choices_from_counts(counts: np.ndarray, top_k: int, label: str, seed: int) -> tuple[np.ndarray, ...]:
    """Choices ``[T, K]`` of each rank, of whose tokens ``counts[rank, e]`` have ``e`` as their first choice.

    Further choices are of experts that somebody has as the first, as far as there are enough of them: an expert that
    is to be empty stays so.
    """
    rng = _generator("choices " + label, seed)
    experts = counts.shape[1]
    used = np.flatnonzero(counts.sum(axis=0))
    found = []
    for row in counts:
        chosen = []
        for first in rng.permutation(np.repeat(np.arange(experts), row)):
            others = [e for e in rng.permutation(used) if e != first]
            others += [e for e in rng.permutation(experts) if e != first and e not in others]
            chosen.append([int(first), *map(int, others[: top_k - 1])])
        found.append(np.array(chosen, dtype=np.int64).reshape(-1, top_k))
    return tuple(found)


def _generator(label: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(label.encode())])


def as_float32(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What ranks are given; exact, because the numbers are coarse."""
    return [array.astype(np.float32) for array in arrays]
