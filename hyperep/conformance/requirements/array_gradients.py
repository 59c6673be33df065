# SPDX-License-Identifier: Apache-2.0
"""Gradients of the array subset, against formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hyperep.conformance.bits import dtypes
from hyperep.conformance.case import Case
from hyperep.conformance.requirement import requirement
from hyperep.platform.capabilities import Capability

PORT = "arrays"
_NEEDS = ("VJP-gradients",)
_CAPABILITIES = (Capability.AUTODIFF,)
Formula = Callable[[np.ndarray, np.ndarray], np.ndarray]


_TOLERANCE = {"float32": 1e-5, "float64": 1e-13}


def _check(case: Case, table: dict[str, tuple[Callable[..., Any], Formula]], x: np.ndarray) -> None:
    for name, (function, formula) in table.items():
        case.note(function=name, dtype=x.dtype.name)
        shape = case.platform.vjp(function, case.tensor(x))[0].shape
        g = case.rng(5).normal(size=tuple(shape)).astype(x.dtype)
        _, (gradient,) = case.gradients(function, [x], g)
        case.close(gradient, formula(x, g), f"gradient through {name}", _TOLERANCE[x.dtype.name])
        case.is_true(
            gradient.dtype == x.dtype, f"gradient through {name} has dtype {gradient.dtype}, must be {x.dtype}"
        )


def _normal(case: Case, dtype: str, shape: tuple[int, ...], *key: int) -> np.ndarray:
    return case.rng(*key).normal(size=shape).astype(dtype)


@requirement(
    "XP-grad-elementwise",
    "Elementwise functions and operators have their gradients, in float64 to its own digits.",
    port=PORT,
    capabilities=_CAPABILITIES,
    needs=_NEEDS,
)
def elementwise(case: Case) -> None:
    for dtype in dtypes(case, tuple(_TOLERANCE)):
        x = np.abs(_normal(case, dtype, (3, 4), 1)) + np.dtype(dtype).type(0.5)
        y = np.abs(_normal(case, dtype, (3, 4), 2)) + np.dtype(dtype).type(0.6)
        _check(case, _elementwise(case, y), x)


def _elementwise(case: Case, y: np.ndarray) -> dict[str, tuple[Callable[..., Any], Formula]]:
    xp, other = case.xp, case.tensor(y)
    return {
        "exp": (lambda x: xp.exp(x), lambda x, g: g * np.exp(x)),
        "log": (lambda x: xp.log(x), lambda x, g: g / x),
        "sqrt": (lambda x: xp.sqrt(x), lambda x, g: g / (2 * np.sqrt(x))),
        "tanh": (lambda x: xp.tanh(x), lambda x, g: g * (1 - np.tanh(x) ** 2)),
        "abs": (lambda x: xp.abs(-x), lambda x, g: g),
        "maximum": (lambda x: xp.maximum(x, other), lambda x, g: g * (x > y)),
        "minimum": (lambda x: xp.minimum(x, other), lambda x, g: g * (x < y)),
        "where": (lambda x: xp.where(other > 1, x, other), lambda x, g: g * (y > 1)),
        "x * y": (lambda x: x * other, lambda x, g: g * y),
        "y / x": (lambda x: other / x, lambda x, g: -g * y / x**2),
        "x ** 2": (lambda x: x**2, lambda x, g: 2 * g * x),
        "1 - x": (lambda x: 1 - x, lambda x, g: -g),
        "x + x * x": (lambda x: x + x * x, lambda x, g: g * (1 + 2 * x)),
    }


@requirement(
    "XP-grad-shapes",
    "Functions that move or repeat elements have their gradients, in float64 to its own digits; repeats sum them.",
    port=PORT,
    capabilities=_CAPABILITIES,
    needs=_NEEDS,
)
def shapes(case: Case) -> None:
    xp = case.xp
    table: dict[str, tuple[Callable[..., Any], Formula]] = {
        "reshape": (lambda x: xp.reshape(x, (12,)), lambda x, g: g.reshape(3, 4)),
        "permute_dims": (lambda x: xp.permute_dims(x, (1, 0)), lambda x, g: g.T),
        "expand_dims": (lambda x: xp.expand_dims(x, axis=0), lambda x, g: g[0]),
        "broadcast_to": (lambda x: xp.broadcast_to(x, (5, 3, 4)), lambda x, g: g.sum(axis=0)),
        "concat": (lambda x: xp.concat([x, 2 * x], axis=0), lambda x, g: g[:3] + 2 * g[3:]),
        "stack": (lambda x: xp.stack([x, 3 * x], axis=0), lambda x, g: g[0] + 3 * g[1]),
        "slice": (lambda x: x[1:, :2], lambda x, g: np.pad(g, ((1, 0), (0, 2)))),
        "astype": (lambda x: xp.astype(x, xp.float32), lambda x, g: g),
    }
    for dtype in dtypes(case, tuple(_TOLERANCE)):
        if dtype == "float64":
            table["astype"] = (lambda x: xp.astype(x, xp.float64), lambda x, g: g)
        _check(case, table, _normal(case, dtype, (3, 4), 1))


@requirement(
    "XP-grad-indexing",
    "take and take_along_axis have gradients that sum over repeated indices, in float64 to its own digits.",
    port=PORT,
    capabilities=_CAPABILITIES,
    needs=_NEEDS,
)
def indexing(case: Case) -> None:
    xp = case.xp
    rows, columns = np.array([2, 0, 2, 2]), np.array([[3, 3], [0, 1], [2, 3]])
    index, within = case.tensor(rows), case.tensor(columns)

    def scatter_rows(x: np.ndarray, g: np.ndarray) -> np.ndarray:
        out = np.zeros_like(x)
        np.add.at(out, rows, g)
        return out

    def scatter_columns(x: np.ndarray, g: np.ndarray) -> np.ndarray:
        out = np.zeros_like(x)
        np.add.at(out, (np.arange(3)[:, None], columns), g)
        return out

    table: dict[str, tuple[Callable[..., Any], Formula]] = {
        "take": (lambda x: xp.take(x, index, axis=0), scatter_rows),
        "take_along_axis": (lambda x: xp.take_along_axis(x, within, axis=1), scatter_columns),
    }
    for dtype in dtypes(case, tuple(_TOLERANCE)):
        _check(case, table, _normal(case, dtype, (3, 4), 1))


@requirement(
    "XP-grad-reductions",
    "sum, mean, max, min, cumulative_sum and matmul have their gradients, in float64 to its own digits.",
    port=PORT,
    capabilities=_CAPABILITIES,
    needs=_NEEDS,
)
def reductions(case: Case) -> None:
    for dtype in dtypes(case, tuple(_TOLERANCE)):
        _check(case, _reductions(case, _normal(case, dtype, (4, 2), 3)), _normal(case, dtype, (3, 4), 1))


def _reductions(case: Case, w: np.ndarray) -> dict[str, tuple[Callable[..., Any], Formula]]:
    xp, weight = case.xp, case.tensor(w)
    return {
        "sum": (lambda x: xp.sum(x), lambda x, g: np.broadcast_to(g, x.shape)),
        "sum over an axis": (lambda x: xp.sum(x, axis=1), lambda x, g: np.broadcast_to(g[:, None], x.shape)),
        "mean": (lambda x: xp.mean(x, axis=0), lambda x, g: np.broadcast_to(g / 3, x.shape)),
        "max": (lambda x: xp.max(x, axis=1, keepdims=True), lambda x, g: g * (x == x.max(axis=1, keepdims=True))),
        "min": (lambda x: xp.min(x, axis=1, keepdims=True), lambda x, g: g * (x == x.min(axis=1, keepdims=True))),
        "cumulative_sum": (
            lambda x: xp.cumulative_sum(x, axis=1),
            lambda x, g: np.flip(np.cumsum(np.flip(g, 1), axis=1), 1),
        ),
        "matmul": (lambda x: xp.matmul(x, weight), lambda x, g: g @ w.T),
        "@": (lambda x: x @ weight, lambda x, g: g @ w.T),
    }
