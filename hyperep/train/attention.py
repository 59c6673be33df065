# SPDX-License-Identifier: Apache-2.0
"""Causal self-attention with rotary positions (arXiv:1706.03762, arXiv:2104.09864)."""

from __future__ import annotations

from typing import Any

import numpy as np

from hyperep.moe.init import uniform_fan_in
from hyperep.moe.scores import softmax
from hyperep.platform.protocol import Module, Platform

__all__ = ["Attention", "rotary_tables"]


def Attention(  # noqa: N802 (it makes modules, as a class would)
    platform: Platform[Any], dim: int, heads: int, max_length: int, rng: np.random.Generator
) -> Module:
    """Make a causal attention module without biases, of at most *max_length* positions.

    Returns:
        A module called with rows ``[B * L, D]`` and the number of sequences ``B``; it returns ``[B * L, D]``. Each of
        its four weights is ``[D, D]``, output features first.
    """
    xp = platform.xp
    size = dim // heads
    cosine, sine, quarter_turn = (platform.from_host(table) for table in rotary_tables(max_length, size))
    future = np.triu(np.full((max_length, max_length), -1e30, np.float32), k=1)
    mask = platform.from_host(future)  # finite, so that nothing becomes NaN

    def split(x: Any, sequences: int) -> Any:
        return xp.permute_dims(xp.reshape(x, (sequences, x.shape[0] // sequences, heads, size)), (0, 2, 1, 3))

    def rotate(x: Any, length: int) -> Any:
        return x * cosine[:length] + xp.matmul(x, quarter_turn) * sine[:length]

    def forward(m: Any, x: Any, sequences: int) -> Any:
        length = x.shape[0] // sequences
        query, key, value = (
            split(linear(platform, x, w), sequences) for w in (m.query, m.key, m.value)
        )  # [B, h, L, d]
        query, key = rotate(query, length), rotate(key, length)
        scores = xp.matmul(query, xp.permute_dims(key, (0, 1, 3, 2))) * size**-0.5  # [B, h, L, L]
        mixed = xp.matmul(softmax(platform, scores + mask[:length, :length]), value)  # [B, h, L, d]
        return linear(platform, xp.reshape(xp.permute_dims(mixed, (0, 2, 1, 3)), x.shape), m.output)

    weights = {
        name: platform.from_host(uniform_fan_in(rng, (dim, dim))) for name in ("query", "key", "value", "output")
    }
    return platform.make_module("Attention", weights, forward, description=f"dim={dim}, heads={heads}")


def linear(platform: Platform[Any], x: Any, weight: Any) -> Any:
    """``x w^T``: ``[N, D] x [H, D] -> [N, H]``."""
    xp = platform.xp
    return xp.matmul(x, xp.permute_dims(weight, (1, 0)))


def rotary_tables(length: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cosines and sines of every position's angles, ``[length, size]``, and the quarter turn ``[size, size]``.

    ``x * cosine + (x @ quarter_turn) * sine`` turns the pair ``(x[i], x[i + size / 2])`` by the angle ``i`` of its
    position; the turn as a product needs no slicing of ``x``, whose backward would pad.
    """
    half = size // 2
    frequencies = 10000.0 ** (-np.arange(half) / half)
    angles = np.arange(length)[:, None] * np.tile(frequencies, 2)  # [length, size]
    turn = np.zeros((size, size), np.float32)
    turn[np.arange(half), half + np.arange(half)] = 1.0
    turn[half + np.arange(half), np.arange(half)] = -1.0
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), turn
