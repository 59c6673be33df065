# SPDX-License-Identifier: Apache-2.0
"""Sums of rows by a permutation, from members that every platform has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hyperep.platform.dtypes import dtype_named

if TYPE_CHECKING:
    from hyperep.platform.protocol import Platform

__all__ = ["sum_rows", "widened"]


def sum_rows(platform: Platform[Any], x: Any, index: Any, inverse: Any, weights: Any = None) -> Any:
    """See :meth:`hyperep.platform.protocol.Platform.sum_rows`. Keeps the rows only where there are weights."""
    xp = platform.xp
    tokens, terms = index.shape
    rows, width = x.shape
    # Known on the host: all terms have a row, unless there are fewer rows than terms.
    named = None if rows == tokens * terms else index < rows  # bool [T, K]

    def terms_of(x: Any) -> Any:
        """``[T, K, D]``, widened; zeros for a term without a row."""
        at = index
        if named is not None:
            x = xp.concat([x, xp.zeros((1, width), dtype=x.dtype)], axis=0)
            at = xp.where(named, index, xp.full(index.shape, rows, dtype=index.dtype))
        return widened(xp, xp.reshape(xp.take(x, xp.reshape(at, (-1,)), axis=0), (tokens, terms, width)))

    def of_rows(w: Any) -> Any:
        """*w*, widened, and zero where there is no row: its own value may be anything there, also NaN."""
        w = widened(xp, w)
        return w if named is None else xp.where(named, w, xp.zeros_like(w))

    def forward(x: Any, *weights: Any) -> tuple[Any, tuple[Any, ...]]:
        by_token = terms_of(x)
        for w in weights:
            by_token = by_token * xp.expand_dims(of_rows(w), axis=2)
        return xp.astype(xp.sum(by_token, axis=1), x.dtype), (x, *weights) if weights else ()

    def backward(residuals: Any, cotangents: Any, needed: tuple[bool, ...]) -> tuple[Any, ...]:
        (g,) = cotangents
        if not residuals:
            return (xp.take(g, _owner(platform, inverse, tokens, terms), axis=0),)
        (x, w), wide = residuals, xp.expand_dims(widened(xp, g), axis=1)  # [T, 1, D]
        grad_x = grad_w = None
        if needed[0]:
            by_token = xp.reshape(wide * xp.expand_dims(widened(xp, w), axis=2), (tokens * terms, width))
            grad_x = xp.astype(xp.take(by_token, inverse, axis=0), x.dtype)
        if needed[1]:
            grad_w = xp.astype(of_rows(xp.sum(terms_of(x) * wide, axis=2)), w.dtype)
        return grad_x, grad_w

    return platform.custom_vjp(forward, backward)(x, *(() if weights is None else (weights,)))


def _owner(platform: Platform[Any], inverse: Any, tokens: int, terms: int) -> Any:
    """The result that each row goes into: ``inverse // K`` by a lookup, int64 ``[N]``."""
    xp = platform.xp
    numbers = xp.broadcast_to(xp.reshape(platform.arange(tokens), (tokens, 1)), (tokens, terms))
    return xp.take(xp.reshape(numbers, (-1,)), inverse, axis=0)


def widened(xp: Any, x: Any) -> Any:
    """*x* in float32 at least, itself if it is that wide already; integers stay what they are, and exact."""
    exact = dtype_named(xp, x.dtype, ("float32", "float64", "int32", "int64")) is not None
    return x if exact else xp.astype(x, xp.float32)
