# SPDX-License-Identifier: Apache-2.0
"""Faults of collectives, groups and barriers; ranks that hang or die."""

import os
import time

import numpy as np

from hyperep.loopback.platform import LoopbackPlatform, LoopbackWork, _value
from mutants.registry import mutant


@mutant("A2A-uneven-splits")
class SplitsSwapped(LoopbackPlatform):
    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        return super().all_to_all_single(x, input_splits, output_splits, group, async_op)


@mutant("A2A-even")
class SplitsInElements(LoopbackPlatform):
    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        flat = _value(x).reshape(-1)
        out = super().all_to_all_single(flat, output_splits, input_splits, group)
        return out.reshape(-1, *x.shape[1:])


@mutant("A2A-even")
class ValuesAllZero(LoopbackPlatform):
    """Reports success, in the right shape."""

    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        out = super().all_to_all_single(x, output_splits, input_splits, group)
        return np.zeros_like(out)


@mutant("A2A-even")
class OrderOfSourcesReversed(LoopbackPlatform):
    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        out = super().all_to_all_single(x, output_splits, input_splits, group)
        splits = output_splits or [len(out) // self.group_size(group)] * self.group_size(group)
        return np.concatenate(np.split(out, np.cumsum(splits)[:-1])[::-1])


@mutant("A2A-zero-splits", deadline=10, says="while others wait")
class EmptyExchangeSkipped(LoopbackPlatform):
    """A rank with nothing to send does not take part."""

    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        if len(x) == 0 and input_splits is not None and not async_op:
            return np.zeros((sum(output_splits), *x.shape[1:]), _value(x).dtype)
        return super().all_to_all_single(x, output_splits, input_splits, group, async_op)


@mutant("A2A-integers")
class IntegersThroughFloat(LoopbackPlatform):
    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        if async_op or _value(x).dtype.kind != "i":
            return super().all_to_all_single(x, output_splits, input_splits, group, async_op)
        out = super().all_to_all_single(_value(x).astype(np.float32), output_splits, input_splits, group)
        return out.astype(_value(x).dtype)


@mutant("A2A-integers", says="dtype")
class DtypeChanged(LoopbackPlatform):
    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        if _value(x).dtype == np.int32:
            x = _value(x).astype(np.int64)
        return super().all_to_all_single(x, output_splits, input_splits, group, async_op)


@mutant("A2A-strided")
class InputByMemory(LoopbackPlatform):
    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        value = _value(x)
        return super().all_to_all_single(
            value.ravel(order="K").reshape(value.shape), output_splits, input_splits, group, async_op
        )


@mutant("A2A-wrong-splits")
class RowsDropped(LoopbackPlatform):
    """Splits that sum to less than the rows send what they say, without a word."""

    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        if input_splits is not None and sum(input_splits) < len(x):
            x = x[: sum(input_splits)]
        return super().all_to_all_single(x, output_splits, input_splits, group, async_op)


@mutant("ASYNC-wait")
class NeverWaited(LoopbackPlatform):
    """wait() returns the buffer although nothing has arrived in it."""

    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        out = super().all_to_all_single(x, output_splits, input_splits, group)
        return LoopbackWork(lambda: np.zeros_like(out)) if async_op else out


class _Again:
    def __init__(self, start):
        self.start = start

    def wait(self):
        return self.start()


@mutant("ASYNC-wait-twice", deadline=10)
class WaitCommunicatesAgain(LoopbackPlatform):
    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        start = super().all_to_all_single
        if async_op:
            return _Again(lambda: start(x, output_splits, input_splits, group))
        return start(x, output_splits, input_splits, group)


@mutant("AR-sum")
class ReductionAveraged(LoopbackPlatform):
    def all_reduce(self, x, group=None, op="sum"):
        out = super().all_reduce(x, group, op)
        return (out / self.group_size(group)).astype(out.dtype) if op == "sum" else out


@mutant("AR-new-tensor")
class ReductionInPlace(LoopbackPlatform):
    def all_reduce(self, x, group=None, op="sum"):
        out = super().all_reduce(x, group, op)
        if isinstance(x, np.ndarray):
            x[...] = out
        return out


@mutant("AR-same-bits", ranks=4)
class ReductionOrderDiffers(LoopbackPlatform):
    """Each rank adds its own term first."""

    def all_reduce(self, x, group=None, op="sum"):
        if op != "sum" or _value(x).dtype != np.float32 or group is not None:
            return super().all_reduce(x, group, op)
        terms = self.all_gather(_value(x)[None], group)
        total = np.zeros_like(terms[0])
        for shift in range(self.world_size):
            total = total + terms[(self.rank + shift) % self.world_size]
        return total


@mutant("BC-values")
class BroadcastFromFirst(LoopbackPlatform):
    def broadcast(self, x, source=0, group=None):
        return super().broadcast(x, 0, group)


@mutant("GROUP-broadcast-source", ranks=4)
class SourceIsWorldRank(LoopbackPlatform):
    def broadcast(self, x, source=0, group=None):
        members = self._members(group)
        return super().broadcast(x, members.index(source) if source in members else 0, group)


@mutant("MESH-lines")
class GroupOrderReversed(LoopbackPlatform):
    def new_group(self, ranks):
        return super().new_group(list(ranks)[::-1])


@mutant("GROUP-subgroup", ranks=4)
class SubgroupIsWorld(LoopbackPlatform):
    def all_gather(self, x, group=None):
        return super().all_gather(x, None)


@mutant("GROUP-twice")
class GroupsShareOrder(LoopbackPlatform):
    """Two groups of the same ranks use one queue, and a rank takes what it waits for first."""

    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        if not async_op or group is None:
            return super().all_to_all_single(x, output_splits, input_splits, group, async_op)
        started = self.__dict__.setdefault("started", [])
        started.append(super().all_to_all_single(x, output_splits, input_splits, group, True))
        return LoopbackWork(lambda: started.pop(0).wait())


@mutant("WORLD-barrier")
class BarrierDoesNothing(LoopbackPlatform):
    def barrier(self, group=None):
        pass


@mutant("A2A-even", deadline=10, says="in all_to_all_single")
class RankHangs(LoopbackPlatform):
    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        if self.rank == 1:
            time.sleep(600)
        return super().all_to_all_single(x, output_splits, input_splits, group, async_op)


@mutant("AR-sum", says="status 7")
class RankDies(LoopbackPlatform):
    def all_reduce(self, x, group=None, op="sum"):
        os._exit(7)


@mutant("A2A-splits-disagree")
class MissingRowsAreZeros(LoopbackPlatform):
    """The buffer is as large as was expected, and what did not come stays as it was."""

    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        if output_splits is None or async_op:
            return super().all_to_all_single(x, output_splits, input_splits, group, async_op)
        out = super().all_to_all_single(x, self._mirrored(input_splits, group), input_splits, group)
        missing = sum(output_splits) - len(out)
        return np.concatenate([out, np.zeros((max(0, missing), *out.shape[1:]), out.dtype)])[: sum(output_splits)]

    def _mirrored(self, input_splits, group):
        members = self._members(group)
        told = self._meet(group, "splits", np.array(input_splits))
        return [int(t[members.index(self.rank)]) for t in told]
