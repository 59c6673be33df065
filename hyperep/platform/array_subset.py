# SPDX-License-Identifier: Apache-2.0
"""The part of the Python Array API standard that a platform's ``xp`` namespace must provide.

The semantics are those of the standard (https://data-apis.org/array-api/): argument names, result dtypes and the
treatment of empty arrays. Everything that the core calls on an array namespace is in this list, and nothing else is;
the conformance suite checks each name, and a test of the core checks that no other name is used.

Result dtypes are the standard's also where a framework would narrow them by itself: ``matmul`` of float32 is float32
under autocast, because routers rely on it. The operator ``@`` follows the framework.

``argsort`` is always called with ``stable=True``. ``take`` is called with a one-dimensional index and ``axis=0``.
"""

from __future__ import annotations

__all__ = ["ARRAY_ATTRIBUTES", "ARRAY_DTYPES", "ARRAY_FUNCTIONS", "ARRAY_OPERATORS"]

ARRAY_FUNCTIONS: tuple[str, ...] = (
    # creation
    "arange",
    "full",
    "ones",
    "zeros",
    "zeros_like",
    # dtype and shape
    "astype",
    "broadcast_to",
    "concat",
    "expand_dims",
    "permute_dims",
    "reshape",
    "stack",
    # indexing, sorting, searching
    "argsort",
    "searchsorted",
    "take",
    "take_along_axis",
    "where",
    # elementwise
    "abs",
    "exp",
    "log",
    "maximum",
    "minimum",
    "sqrt",
    "tanh",
    # reductions and products
    "cumulative_sum",
    "matmul",
    "max",
    "mean",
    "min",
    "sum",
)
"""Functions of the namespace."""

ARRAY_DTYPES: tuple[str, ...] = ("bool", "float32", "int32", "int64")
"""Dtype objects of the namespace that are always there; float16, bfloat16 and float64 are capabilities."""

ARRAY_OPERATORS: tuple[str, ...] = (
    *("__add__", "__sub__", "__mul__", "__truediv__", "__pow__", "__matmul__", "__neg__"),
    *("__radd__", "__rsub__", "__rmul__", "__rtruediv__"),
    *("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__"),
    "__getitem__",
)
"""Operators of a tensor. ``__getitem__`` takes integers, slices with positive step, ``None`` and ``...`` only."""

ARRAY_ATTRIBUTES: tuple[str, ...] = ("dtype", "ndim", "shape")
"""Attributes of a tensor."""
