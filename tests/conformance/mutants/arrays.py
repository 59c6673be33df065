# SPDX-License-Identifier: Apache-2.0
"""Faults of copies to and from the host, and of the array namespace."""

import numpy as np

from hyperep.loopback.array_namespace import array_namespace
from hyperep.loopback.platform import LoopbackPlatform, _value
from mutants.registry import mutant, namespace


@mutant("HOST-roundtrip", says="dtype")
class Int64Narrowed(LoopbackPlatform):
    def from_host(self, array):
        return np.array(array, dtype=np.int32 if array.dtype == np.int64 else array.dtype)


@mutant("HOST-from-host-copies")
class HostAliased(LoopbackPlatform):
    def from_host(self, array):
        return np.asarray(array)


@mutant("HOST-to-host-owns")
class HostView(LoopbackPlatform):
    def to_host(self, *tensors):
        return tuple(_value(x) for x in tensors)


@mutant("HOST-several")
class HostOrderLost(LoopbackPlatform):
    def to_host(self, *tensors):
        return tuple(sorted(super().to_host(*tensors), key=lambda a: a.nbytes))


@mutant("DISPATCH-layout")
class CountsStale(LoopbackPlatform):
    """Counts that are copied a moment too early are those of the dispatch before."""

    def to_host(self, *tensors):
        arrays = super().to_host(*tensors)
        if len(arrays) == 2 and all(a.dtype == np.int64 and a.ndim == 2 for a in arrays):
            before = self.__dict__.get("before", arrays)
            self.before = arrays
            return before
        return arrays


@mutant("DISPATCH-cost", says="host copies")
class HiddenHostCopy(LoopbackPlatform):
    def permute_rows(self, x, index, inverse):
        assert len(self.to_host(index)[0]) == len(x)
        return super().permute_rows(x, index, inverse)


@mutant("XP-argsort")
class SortUnstable(LoopbackPlatform):
    xp = namespace(
        argsort=lambda x, *, axis=-1, descending=False, stable=True: (
            array_namespace.argsort(x, axis=axis, descending=descending)
            if _value(x).dtype.kind == "f"
            else _value(x).shape[axis]
            - 1
            - np.flip(np.argsort(np.flip(_value(x), axis), axis=axis, kind="stable"), axis)
        ).copy()
    )


@mutant("XP-sum", says="dtype")
class SumNarrow(LoopbackPlatform):
    xp = namespace(
        sum=lambda x, *, axis=None, keepdims=False: (
            array_namespace.sum(x, axis=axis, keepdims=keepdims)
            if _value(x).dtype.kind == "f"
            else np.sum(x, axis=axis, keepdims=keepdims, dtype=_value(x).dtype)
        )
    )


@mutant("XP-tanh")
class TanhOverflows(LoopbackPlatform):
    xp = namespace(tanh=lambda x: (np.exp(2 * x) - 1) / (np.exp(2 * x) + 1))


@mutant("HOST-arange")
class NumbersThroughFloats(LoopbackPlatform):
    def arange(self, start, stop=None, step=1, *, dtype=None):
        return super().arange(start, stop, step, dtype=dtype).astype(np.float64).astype(dtype or np.int64)
