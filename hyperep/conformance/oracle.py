# SPDX-License-Identifier: Apache-2.0
"""What should come out, by NumPy on one host: every rank computes it from the data of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["all_to_all", "encoded", "experts", "experts_gradients", "grouped_matmul", "received", "routed", "sent"]


def encoded(source: int, rows: int, row_shape: Sequence[int] = ()) -> np.ndarray:
    """Rows that tell where they come from: the row's number with the sender in front, and a column below that.

    Integers below 2048 for up to 63 ranks, exact in float32 and float16; for others see
    :mod:`hyperep.conformance.bits`.
    """
    number = (source + 1) * 32 + np.arange(rows) % 32
    width = int(np.prod(row_shape))
    values = number[:, None] + np.zeros((1, width), dtype=np.int64)
    if width > 1:
        values[:, 1:] = np.arange(1, width) % 16 + 16 * source  # columns must not be mixed up either
    return values.reshape(rows, *row_shape)


def all_to_all(inputs: Sequence[np.ndarray], splits: np.ndarray, me: int) -> np.ndarray:
    """What rank *me* receives: ``splits[r, s]`` rows go from rank ``r`` to rank ``s``."""
    starts = np.cumsum(splits, axis=1) - splits
    return np.concatenate([x[starts[r, me] : starts[r, me] + splits[r, me]] for r, x in enumerate(inputs)])


def sent(splits: np.ndarray, me: int) -> list[int]:
    """Input splits of rank *me*."""
    return [int(n) for n in splits[me]]


def received(splits: np.ndarray, me: int) -> list[int]:
    """Output splits of rank *me*."""
    return [int(n) for n in splits[:, me]]


def grouped_matmul(x: np.ndarray, weight: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """``[N, D] x [L, H, D] -> [N, H]``, one run of rows after the other."""
    return np.concatenate([x[a:b] @ weight[e].T for e, a, b in _runs(sizes)]).reshape(len(x), weight.shape[1])


def experts(x: np.ndarray, w1: np.ndarray, w2: np.ndarray, w3: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The SwiGLU feed-forward network of each expert on its rows."""
    out = np.zeros((len(x), w2.shape[1]), dtype=x.dtype)
    for e, a, b in _runs(sizes):
        gate, up = x[a:b] @ w1[e].T, x[a:b] @ w3[e].T
        out[a:b] = (gate * _sigmoid(gate) * up) @ w2[e].T
    return out


def experts_gradients(
    x: np.ndarray, w1: np.ndarray, w2: np.ndarray, w3: np.ndarray, sizes: Sequence[int], g: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of the rows, ``w1``, ``w2`` and ``w3`` for the cotangent *g* of :func:`experts`."""
    gx, g1, g2, g3 = (np.zeros_like(a) for a in (x, w1, w2, w3))
    for e, a, b in _runs(sizes):
        gate, up = x[a:b] @ w1[e].T, x[a:b] @ w3[e].T
        s = _sigmoid(gate)
        hidden = gate * s * up
        g_hidden = g[a:b] @ w2[e]
        g_gate = g_hidden * up * s * (1 + gate * (1 - s))
        g_up = g_hidden * gate * s
        gx[a:b] = g_gate @ w1[e] + g_up @ w3[e]
        g1[e], g2[e], g3[e] = g_gate.T @ x[a:b], g[a:b].T @ hidden, g_up.T @ x[a:b]
    return gx, g1, g2, g3


def routed(
    x: np.ndarray, indices: np.ndarray, scores: np.ndarray, experts_weights: Sequence[np.ndarray], g: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """Tokens through the experts that each chooses, weighted and added up; index ``E`` is nobody.

    Args:
        x: tokens ``[T, D]``.
        indices: ``[T, K]``.
        scores: weights of the choices, ``[T, K]``.
        experts_weights: ``w1``, ``w2`` and ``w3``.
        g: cotangent ``[T, D]``.

    Returns:
        The output, and the gradients of tokens, scores, and the three weights.
    """
    w1, w2, w3 = experts_weights
    chosen = [(e, t, k) for (t, k), e in np.ndenumerate(indices) if e < len(w1)]
    e, t, k = np.array(sorted(chosen), dtype=np.int64).reshape(-1, 3).T
    sizes = np.bincount(e, minlength=len(w1)).tolist()
    score = scores[t, k][:, None]
    rows = experts(x[t], w1, w2, w3, sizes)
    out, grad_x, grad_scores = np.zeros_like(x), np.zeros_like(x), np.zeros_like(scores)
    np.add.at(out, t, score * rows)
    grad_scores[t, k] = (g[t] * rows).sum(axis=1)
    grad_rows, *grads = experts_gradients(x[t], w1, w2, w3, sizes, score * g[t])
    np.add.at(grad_x, t, grad_rows)
    return out, grad_x, grad_scores, tuple(grads)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _runs(sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    stops = np.cumsum(sizes).tolist()
    return [(e, stop - int(size), stop) for e, (stop, size) in enumerate(zip(stops, sizes, strict=True))]
