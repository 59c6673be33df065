# SPDX-License-Identifier: Apache-2.0
"""Values that need every bit of their dtype, so that a detour through another one shows; none that it cannot hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hyperep.conformance.case import Case
from hyperep.platform.capabilities import Capability

__all__ = ["WIDE", "dtypes", "host_dtype", "same_bits", "values"]


@dataclass(frozen=True)
class _Float:
    mantissa: int
    """Bits behind the leading one."""
    exponents: tuple[int, int]
    """From and below: no infinities, and no subnormal numbers, which some devices take for zero."""


_FLOATS = {
    "float64": _Float(52, (-900, 900)),
    "float32": _Float(23, (-100, 100)),
    "float16": _Float(10, (-14, 15)),
    "bfloat16": _Float(7, (-100, 100)),
}
_INTEGERS = {"int64": 62, "int32": 30}
"""Bits of the largest value; the sign comes on top."""
_DECLARED = {"float64": Capability.FLOAT64, "float16": Capability.FLOAT16, "bfloat16": Capability.BFLOAT16}

WIDE = ("int32", "int64", "float32", "float64")
"""Dtypes in which sums of small whole numbers are exact, and are taken."""


def dtypes(case: Case, among: Sequence[str] = (*_INTEGERS, *_FLOATS)) -> list[str]:
    """Those that the platform has: the subset's own, and what it declares."""
    return [name for name in among if name not in _DECLARED or case.supports(_DECLARED[name])]


def host_dtype(dtype: str) -> str:
    """How tensors of *dtype* arrive on the host."""
    return "float32" if dtype == "bfloat16" else dtype


def values(case: Case, dtype: str, shape: Sequence[int], *key: int) -> np.ndarray:
    """Random values of *dtype* with all its bits in use; bfloat16 as float32, which holds it."""
    rng = case.rng(21, *key)
    if dtype in _INTEGERS:
        top = 2 ** _INTEGERS[dtype]
        return np.asarray(rng.integers(-top, top, size=tuple(shape), dtype=np.int64) | 1, dtype)
    of = _FLOATS[dtype]
    mantissa = rng.integers(0, 2**of.mantissa, size=tuple(shape)) | 1
    sign = rng.choice([-1.0, 1.0], size=tuple(shape))
    exact = sign * np.ldexp(1 + mantissa / 2**of.mantissa, rng.integers(*of.exponents, size=tuple(shape)))
    return np.asarray(exact, host_dtype(dtype))


def same_bits(case: Case, got: Any, want: np.ndarray, dtype: str, what: str) -> None:
    """Demand a tensor of *dtype* and these values, none of them rounded."""
    case.is_true(got.dtype == case.dtype(dtype), f"{what} in {dtype}: the result has dtype {got.dtype}")
    case.equal(got, want.astype(host_dtype(dtype)), f"{what} in {dtype}")
