# SPDX-License-Identifier: Apache-2.0
"""Platforms whose additions, or lists, come in another order: from call to call, from rank to rank, as ranks arrive."""

import time

import numpy as np

from hyperep.loopback.array_namespace import array_namespace
from hyperep.loopback.platform import LoopbackPlatform, _reduce, _value
from mutants.registry import mutant, namespace


def turn(platform, name):
    """How often this has been asked before."""
    platform.__dict__[name] = platform.__dict__.get(name, -1) + 1
    return platform.__dict__[name]


def reversed_terms(index, inverse):
    terms = index.shape[1]
    return index[:, ::-1], inverse // terms * terms + terms - 1 - inverse % terms


@mutant("SUM-rows-same-bits", ranks=1)
class SumsTurnWithWeights(LoopbackPlatform):
    def sum_rows(self, x, index, inverse, weights=None):
        if weights is None or turn(self, "sums") % 2 == 0:
            return super().sum_rows(x, index, inverse, weights)
        return super().sum_rows(x, *reversed_terms(index, inverse), weights[:, ::-1])


@mutant("SUM-rows-same-bits", ranks=1)
class SumsTurnEveryThirdTime(LoopbackPlatform):
    def sum_rows(self, x, index, inverse, weights=None):
        if weights is not None or turn(self, "sums") % 3 < 2:
            return super().sum_rows(x, index, inverse, weights)
        return super().sum_rows(x, *reversed_terms(index, inverse))


@mutant("SUM-rows-same-bits", ranks=1)
class LongSumsInTwoParts(LoopbackPlatform):
    """As many threads add as are free at the moment."""

    def sum_rows(self, x, index, inverse, weights=None):
        if index.shape[1] < 6 or weights is not None or len(index) * index.shape[1] != len(_value(x)):
            return super().sum_rows(x, index, inverse, weights)
        if turn(self, "sums") % 2 == 0:
            return super().sum_rows(x, index, inverse)
        rows = self.xp.reshape(self.permute_rows(x, index.ravel(), inverse), (*index.shape, x.shape[1]))
        return self.xp.sum(rows[:, 2:], axis=1) + self.xp.sum(rows[:, :2], axis=1)


@mutant("SUM-rows-same-bits", ranks=1)
class WeightGradientsTurn(LoopbackPlatform):
    def sum_rows(self, x, index, inverse, weights=None):
        if weights is None:
            return super().sum_rows(x, index, inverse)
        jitter = np.float32(1 + 2e-7 * (turn(self, "sums") % 2))
        taken = self.custom_vjp(lambda w: (w + 0, ()), lambda r, c, n: (c[0] * jitter,))
        return super().sum_rows(x, index, inverse, taken(weights))


@mutant("GMM-same-bits", ranks=1)
class WeightGradientsInTwoHalves(LoopbackPlatform):
    """Two blocks add their parts of a weight's gradient as they finish."""

    def grouped_matmul(self, x, weight, group_sizes):
        if turn(self, "products") % 2 == 0:
            return super().grouped_matmul(x, weight, group_sizes)
        turned = np.arange(len(_value(x)))
        for start, size in zip(np.cumsum(group_sizes) - group_sizes, group_sizes, strict=True):
            turned[start : start + size] = turned[start : start + size][::-1].copy()
        product = super().grouped_matmul(self.permute_rows(x, turned, turned), weight, group_sizes)
        return self.permute_rows(product, turned, turned)


@mutant("XP-same-bits", ranks=1)
class SumsFromEitherEnd(LoopbackPlatform):
    calls = [0]  # noqa: RUF012 (shared, as a counter of a device is)

    @staticmethod
    def _sum(x, *, axis=None, keepdims=False):
        SumsFromEitherEnd.calls[0] += 1
        x = x[::-1] if SumsFromEitherEnd.calls[0] % 2 and np.ndim(_value(x)) and axis in (0, None) else x
        return array_namespace.sum(x, axis=axis, keepdims=keepdims)

    xp = namespace(sum=_sum)


@mutant("AR-same-order", ranks=4, says="as the last")
class SumsInOrderOfArrival(LoopbackPlatform):
    """The terms of a sum are added as they come: the same bits on every rank, and others at each call."""

    def all_reduce(self, x, group=None, op="sum"):
        if op != "sum" or _value(x).dtype.kind != "f":
            return super().all_reduce(x, group, op)
        arrived = time.monotonic_ns()
        terms = self._meet(group, f"all_reduce({op})", _value(x))
        times = [int(t[0]) for t in self._meet(group, "times", np.array([arrived]))]
        return _reduce("sum", [terms[n] for n in np.argsort(times)])


@mutant("AR-same-order", ranks=4, says="reduce_scatter")
class ScatteredSumsInTurns(LoopbackPlatform):
    def reduce_scatter(self, x, group=None):
        terms = self._meet(group, "reduce_scatter", _value(x))
        first = turn(self, "scatters") % len(terms)
        total = _reduce("sum", terms[first:] + terms[:first])
        rows, me = len(total) // len(terms), self._members(group).index(self.rank)
        return total[me * rows : (me + 1) * rows]


@mutant("AR-same-order", ranks=3, says="gradient of copy_to_group")
class CotangentsInTurns(LoopbackPlatform):
    def copy_to_group(self, x, group=None):
        def backward(residuals, cotangents, needed):
            terms = self._meet(group, "cotangents", _value(cotangents[0]))
            first = turn(self, "copies") % len(terms)
            return (_reduce("sum", terms[first:] + terms[:first]),)

        return self.custom_vjp(lambda x: (x + 0, ()), backward)(x)


@mutant("MOE-same-bits")
class LayersAddUpInTurns(LoopbackPlatform):
    """Only where a token's sums come from several ranks, and at each third call."""

    def sum_rows(self, x, index, inverse, weights=None):
        whole = weights is None and index.shape[1] == self.world_size and x.shape[1] == 6
        if not whole or turn(self, "layers") % 3 < 2:
            return super().sum_rows(x, index, inverse, weights)
        return super().sum_rows(x, index, inverse, weights) * np.float32(1 + 2e-7)


@mutant("MOD-same-order")
class ParametersSortedByAddress(LoopbackPlatform):
    def parameters(self, module):
        listed = list(super().parameters(module).items())
        return dict(listed[::-1] if self.rank else listed)


@mutant("MOD-same-order", says="buffers")
class BuffersSortedByName(LoopbackPlatform):
    def buffers(self, module):
        return dict(sorted(super().buffers(module).items()))


@mutant("MOD-same-order", says="sharded: True")
class ShardsAtTheEnd(LoopbackPlatform):
    def shard_parameter(self, module, name, local, sharding):
        super().shard_parameter(module, name, local, sharding)
        if self.rank:
            module.own_parameters[name] = module.own_parameters.pop(name)


@mutant("MOD-same-order", says="named_modules")
class ModulesInAnyOrder(LoopbackPlatform):
    def named_modules(self, module):
        found = super().named_modules(module)
        return {"": found[""], **dict(sorted(found.items(), key=lambda item: item[0][::-1]))} if self.rank else found
