# SPDX-License-Identifier: Apache-2.0
"""Platforms that take a rank for its position in a group, or a group for the world or for another one."""

import numpy as np

from hyperep.loopback.platform import LoopbackPlatform, LoopbackWork, _reduce, _value
from mutants.registry import mutant


def _sub(platform, group):
    return group is not None and platform.group_size(group) < platform.world_size


@mutant("GROUP-collectives", says="this rank's sums", ranks=4)
class ScatteredByRank(LoopbackPlatform):
    """The part of a rank is the one of its number in the world."""

    def reduce_scatter(self, x, group=None):
        total = _reduce("sum", self._meet(group, "reduce_scatter", _value(x)))
        size = self.group_size(group)
        me, rows = self.rank % size, len(total) // size
        return total[me * rows : (me + 1) * rows]


@mutant("GROUP-collectives", says="max", ranks=4)
class MaximumOverTheWorld(LoopbackPlatform):
    def all_reduce(self, x, group=None, op="sum"):
        out = super().all_reduce(x, group, op)
        if not _sub(self, group) or op != "max":
            return out
        return np.maximum(out, np.float32(1000))


@mutant("GROUP-collectives", says="min", ranks=3)
class MinimumIsMaximumInGroups(LoopbackPlatform):
    def all_reduce(self, x, group=None, op="sum"):
        return super().all_reduce(x, group, "max" if _sub(self, group) and op == "min" else op)


@mutant("GROUP-collectives", says="under way", ranks=4)
class UnderWayByRank(LoopbackPlatform):
    """An exchange under way takes the rows that are meant for the position of the rank's number."""

    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        out = super().all_to_all_single(x, output_splits, input_splits, group)
        if not async_op:
            return out
        turned = np.roll(out, self.rank, axis=0) if _sub(self, group) else out
        return LoopbackWork(lambda: turned)


@mutant("GROUP-collectives", ranks=3)
class GroupsBeginWithRankZero(LoopbackPlatform):
    """Right where ranks are positions."""

    def all_gather(self, x, group=None):
        out = super().all_gather(x, group)
        members = self._members(group)
        return out if members[0] == 0 or len(members) < 2 else np.roll(out, len(_value(x)), axis=0)


@mutant("GROUP-collectives", ranks=4)
class GroupsLeaveNobodyOut(LoopbackPlatform):
    """Right in groups of every second rank, which the usual meshes are made of."""

    def broadcast(self, x, source=0, group=None):
        members = self._members(group)
        steps = set(np.diff(members).tolist())
        return super().broadcast(x, 0 if len(steps) == 1 and steps.pop() not in (1, 2) else source, group)


@mutant("GROUP-every-gradient", ranks=3)
class CotangentsReducedInTheWorld(LoopbackPlatform):
    """By twice as much in groups that do not begin with rank 0."""

    def copy_to_group(self, x, group=None):
        def backward(residuals, cotangents, needed):
            scale = 2 if _sub(self, group) and self._members(group)[0] and self.group_size(group) > 1 else 1
            return (scale * self.all_reduce(cotangents[0], group),)

        return self.custom_vjp(lambda x: (x + 0, ()), backward)(x)


@mutant("GROUP-every-gradient", says="gradient", ranks=4)
class SplitsOfGroupsNotExchanged(LoopbackPlatform):
    """The backward of an even exchange is right."""

    def differentiable_all_to_all_single(self, x, input_splits, output_splits, group=None):
        def backward(residuals, cotangents, needed):
            g = self.all_to_all_single(cotangents[0], input_splits, output_splits, group)
            return (np.flip(g, 0) if _sub(self, group) and len(set(input_splits)) > 1 else g,)

        return self.custom_vjp(lambda x: (self.all_to_all_single(x, output_splits, input_splits, group), ()), backward)(
            x
        )


@mutant("WORLD-barrier-group", deadline=10)
class BarrierOfTheWorld(LoopbackPlatform):
    def barrier(self, group=None):
        super().barrier()


@mutant("GROUP-barrier", ranks=3, says="left the barrier")
class BarrierOfGroupsDoesNothing(LoopbackPlatform):
    def barrier(self, group=None):
        if not _sub(self, group):
            super().barrier(group)


@mutant("GROUP-barrier", ranks=3, says="left the barrier")
class BarrierWaitsForTheFirst(LoopbackPlatform):
    """The first rank of a group lets the others in, and waits for nobody."""

    def barrier(self, group=None):
        if not _sub(self, group):
            super().barrier(group)
        elif self._members(group)[0] != self.rank:
            self._post(group, "barrier", None)()
        else:
            self._post(group, "barrier", None)


@mutant("GROUP-own-order", deadline=10)
class SameRanksSameGroup(LoopbackPlatform):
    def new_group(self, ranks):
        made = super().new_group(ranks)
        return self.__dict__.setdefault("made", {}).setdefault(tuple(ranks), made)


@mutant("GROUP-own-order", ranks=4, deadline=10)
class SameFewRanksSameGroup(LoopbackPlatform):
    """Groups of all ranks are kept apart."""

    def new_group(self, ranks):
        made = super().new_group(ranks)
        few = len(ranks) < self.world_size
        return self.__dict__.setdefault("made", {}).setdefault(tuple(ranks), made) if few else made


@mutant("GROUP-twice")
class SecondGroupShares(LoopbackPlatform):
    """Exchanges under way are numbered by the ranks of a group: who is waited for first gets the first rows."""

    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        work = super().all_to_all_single(x, output_splits, input_splits, group, async_op)
        if not async_op or group is None:
            return work
        started = self.__dict__.setdefault("started", {}).setdefault(self._members(group), [])
        started.append(work)
        return LoopbackWork(lambda: started.pop(0).wait())


@mutant("GROUP-twice", ranks=3, says="exchange 0 of the")
class SecondSubgroupShares(SecondGroupShares):
    """The same, of groups of some ranks only."""

    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        of = SecondGroupShares if _sub(self, group) else LoopbackPlatform
        return of.all_to_all_single(self, x, output_splits, input_splits, group, async_op)
