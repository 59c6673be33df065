# SPDX-License-Identifier: Apache-2.0
"""Faults of permutations, sums of rows, grouped products and experts."""

import numpy as np

from hyperep.loopback.platform import LoopbackPlatform, _value
from mutants.registry import mutant


@mutant("PERM-empty", says="shape")
class ZeroRowsDropped(LoopbackPlatform):
    def permute_rows(self, x, index, inverse):
        return super().permute_rows(x, index, inverse) if len(x) else np.zeros((0,), np.float32)


@mutant("PERM-many-rows", ranks=1)
class IndexThroughFloat(LoopbackPlatform):
    def permute_rows(self, x, index, inverse):
        rounded = np.minimum(index.astype(np.float32).astype(np.int64), len(x) - 1)
        return super().permute_rows(x, rounded, inverse)


@mutant("GMM-empty-group")
class EmptyGroupGradientUninitialised(LoopbackPlatform):
    def grouped_matmul(self, x, weight, group_sizes):
        sizes = self.to_host(group_sizes)[0]
        garbage = self.custom_vjp(
            lambda w: (w + 0, ()),
            lambda r, c, needed: (np.where((sizes == 0)[:, None, None], np.float32(7), c[0]),),
        )
        return super().grouped_matmul(x, garbage(weight), group_sizes)


@mutant("GMM-nan-stays")
class MaskedByMultiplication(LoopbackPlatform):
    """``x * 0`` for the rows of other groups: zeros, unless there is a NaN."""

    def grouped_matmul(self, x, weight, group_sizes):
        sizes = self.to_host(group_sizes)[0]
        stops = np.cumsum(sizes)
        total = 0.0
        for e, (n, stop) in enumerate(zip(sizes, stops, strict=True)):
            mask = np.zeros((len(_value(x)), 1), np.float32)
            mask[stop - n : stop] = 1
            total = total + (x * mask) @ self.xp.permute_dims(weight[e], (1, 0))
        return total


@mutant("SWIGLU-grad")
class GateAndUpSwapped(LoopbackPlatform):
    def grouped_swiglu(self, x, w1, w2, w3, group_sizes):
        return super().grouped_swiglu(x, w3, w2, w1, group_sizes)


@mutant("SUM-rows")
class WeightsDetached(LoopbackPlatform):
    def sum_rows(self, x, index, inverse, weights=None):
        return super().sum_rows(x, index, inverse, None if weights is None else _value(weights))


@mutant("SUM-rows-no-row")
class NoRowIsTheLastRow(LoopbackPlatform):
    """An index beyond the rows is clipped, as some gathers do."""

    def sum_rows(self, x, index, inverse, weights=None):
        return super().sum_rows(x, np.minimum(index, max(len(x) - 1, 0)) if len(x) else index, inverse, weights)


@mutant("SUM-rows-no-row", says="NaN")
class NoRowTimesItsWeight(LoopbackPlatform):
    """A term without a row is a row of zeros, which a weight of NaN makes one of NaN."""

    def sum_rows(self, x, index, inverse, weights=None):
        if weights is None or not len(x):
            return super().sum_rows(x, index, inverse, weights)
        none = np.zeros((1, x.shape[1]), np.float32)
        rows = self.xp.take(self.xp.concat([x, none], axis=0), np.minimum(index, len(x)).ravel(), axis=0)
        return (rows.reshape(*index.shape, x.shape[1]) * self.xp.expand_dims(weights, axis=2)).sum(axis=1)


@mutant("SUM-rows-no-row", says="gradient of the weights")
class NoRowGivesItsWeightAGradient(LoopbackPlatform):
    def sum_rows(self, x, index, inverse, weights=None):
        if weights is not None:
            noted = self.custom_vjp(lambda w: (w + 0, ()), lambda r, c, needed: (c[0] + (index >= len(x)),))
            weights = noted(weights)
        return super().sum_rows(x, index, inverse, weights)


@mutant("SUM-rows-strided")
class IndexByMemory(LoopbackPlatform):
    """A kernel walks the index as it lies in memory, which for a transposed one is another order."""

    def sum_rows(self, x, index, inverse, weights=None):
        return super().sum_rows(x, index.ravel(order="K").reshape(index.shape), inverse, weights)


@mutant("SUM-rows-strided", says="gradient of the rows")
class CotangentOfSumsByMemory(LoopbackPlatform):
    def sum_rows(self, x, index, inverse, weights=None):
        taken = self.custom_vjp(
            lambda x: (x + 0, ()), lambda r, c, needed: (c[0].ravel(order="K").reshape(c[0].shape),)
        )
        return taken(super().sum_rows(x, index, inverse, weights))


@mutant("SUM-rows-float64")
class SumsInFloat32(LoopbackPlatform):
    """In float32 at least was read as in float32."""

    def sum_rows(self, x, index, inverse, weights=None):
        if str(x.dtype) != "float64":
            return super().sum_rows(x, index, inverse, weights)
        narrow = (None if w is None else self.xp.astype(w, np.float32) for w in (x, weights))
        x, weights = narrow
        return self.xp.astype(super().sum_rows(x, index, inverse, weights), np.float64)
