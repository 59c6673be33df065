# SPDX-License-Identifier: Apache-2.0
"""Faults of the exchange of tokens, and of the styles that are called with tokens."""

import dataclasses
import functools
from typing import ClassVar

import numpy as np

from hyperep.loopback.platform import LoopbackPlatform, _splits, _value
from mutants.registry import mutant


@mutant("TOKENS-layout", says="numbers")
class MetadataOfTheWrongRank(LoopbackPlatform):
    """Choices are renumbered as if they had gone to the rank before."""

    core: ClassVar = {
        "hyperep.exchange.tokens:own_choices": lambda own: (
            lambda platform, numbers, first, local: own(platform, numbers, max(first - local, 0), local)
        )
    }


@mutant("TOKENS-layout", says="weights")
class WeightsOfChoicesExchanged(LoopbackPlatform):
    @staticmethod
    def exchanged(send):
        def change(context, tokens, indices, weights):
            tokens, weights, numbers = send(context, tokens, indices, weights)
            return tokens, context.platform.xp.concat([weights[:, 1:], weights[:, :1]], axis=1), numbers

        return change

    core: ClassVar = {"hyperep.exchange.tokens:_send": exchanged}


@mutant("TOKENS-layout", says="tokens that arrived")
class TokensSentForEachChoice(LoopbackPlatform):
    """Also where no expert of the rank was chosen: the sums are right, as nobody's add nothing."""

    core: ClassVar = {"hyperep.exchange.token_input:choices_by_rank": lambda by: lambda *a: np.maximum(by(*a), 1)}


def _own(context, x):
    """``[P, 1]``: whether a token that arrived came from this rank itself."""
    mine = np.repeat(np.arange(len(context.output_splits)), context.output_splits) == context.platform.rank
    return mine[:, None]


@mutant("TOKENS-random", says="gradient of the tokens")
class GradientOfACopyLost(LoopbackPlatform):
    """What comes back in backward from other ranks is not added."""

    @staticmethod
    def lost(send):
        def change(context, tokens, indices, weights):
            tokens, *rest = send(context, tokens, indices, weights)
            cut = context.platform.custom_vjp(lambda x: (x + 0, ()), lambda r, c, n: (c[0] * _own(context, c[0]),))
            return cut(tokens), *rest

        return change

    core: ClassVar = {"hyperep.exchange.tokens:_send": lost}


@mutant("TOKENS-random", says="sums of the tokens")
class PartialSumAddedTwice(LoopbackPlatform):
    core: ClassVar = {
        "hyperep.exchange.routed:combine_tokens": lambda combine: (
            lambda sums, context: combine(sums * (1 + _own(context, sums)), context)
        )
    }


@mutant("TOKENS-random", says="gradient of the weights")
class GradientOfWeightsDetached(LoopbackPlatform):
    """Weights come as numbers that nobody differentiates: the forward is right, and the router learns nothing."""

    core: ClassVar = {
        "hyperep.exchange.tokens:_send": lambda send: (
            lambda context, tokens, indices, weights: send(context, tokens, indices, _value(weights))
        )
    }


@mutant("TOKENS-duplicates")
class DuplicatesCountOnce(LoopbackPlatform):
    @staticmethod
    def once(dispatch):
        def change(tokens, indices, weights, mesh, *, num_experts):
            earlier = np.tril(indices[:, :, None] == indices[:, None, :], -1).any(axis=2)
            return dispatch(tokens, indices, weights * ~earlier, mesh, num_experts=num_experts)

        return change

    core: ClassVar = {"hyperep.exchange.routed:dispatch_tokens": once}


@mutant("TOKENS-nobody")
class NobodyIsExpertZero(LoopbackPlatform):
    core: ClassVar = {
        "hyperep.exchange.routed:dispatch_tokens": lambda dispatch: (
            lambda tokens, indices, *rest, num_experts: dispatch(
                tokens, np.where(indices == num_experts, 0, indices), *rest, num_experts=num_experts
            )
        )
    }


@mutant("TOKENS-nowhere", says="sums of the tokens")
class NowhereIsHome(LoopbackPlatform):
    """A token that goes to nobody comes back as it is, and not as zeros."""

    @staticmethod
    def home(over):
        def change(experts, mesh, num_experts):
            routed = over(experts, mesh, num_experts)
            return lambda x, indices, w: routed(x, indices, w) + x * (indices == num_experts).all(axis=1)[:, None]

        return change

    core: ClassVar = {"hyperep.conformance.requirements.tokens:over_ranks": home}


@mutant("TOKENS-hot-rank", deadline=10, says="while others wait")
class NothingArrivedWithoutHistory(LoopbackPlatform):
    """A rank that nothing was sent to does not take part in backward: the others wait for it."""

    @staticmethod
    def detached(combine):
        def change(sums, context):
            return combine(sums if sum(context.output_splits) else _value(sums), context)

        return change

    core: ClassVar = {"hyperep.exchange.routed:combine_tokens": detached}


@mutant("TOKENS-empty-rank", says="on rank 0 only")
class NoTokensIsAnError(LoopbackPlatform):
    """As a search, an argmax or a reshape does that was never tried without elements."""

    @staticmethod
    def strict(combine):
        def change(sums, context):
            out = combine(sums, context)
            if not len(out):
                raise ValueError("zero-size array")
            return out

        return change

    core: ClassVar = {"hyperep.exchange.routed:combine_tokens": strict}


@mutant("TOKENS-frozen")
class GradientsExchangedWhereWanted(LoopbackPlatform):
    """Tokens and weights travel apart, and each is exchanged in backward only by ranks that want its gradient."""

    @staticmethod
    def apart(send):
        def change(context, tokens, indices, weights):
            there, _, numbers = send(context, tokens, indices, _value(weights))
            return there, send(context, _value(tokens), indices, weights)[1], numbers

        return change

    core: ClassVar = {"hyperep.exchange.tokens:_send": apart}


@mutant("TOKENS-strided")
class SumsByMemory(LoopbackPlatform):
    """The cotangent of the sums is taken as it lies in memory, which for a transposed one is another order."""

    @staticmethod
    def by_memory(combine):
        def change(sums, context):
            taken = context.platform.custom_vjp(
                lambda x: (x + 0, ()), lambda r, c, n: (c[0].ravel(order="K").reshape(c[0].shape),)
            )
            return taken(combine(sums, context))

        return change

    core: ClassVar = {"hyperep.exchange.routed:combine_tokens": by_memory}


@mutant("TOKENS-zero-cotangent")
class NothingToSendBack(LoopbackPlatform):
    """A rank whose cotangent is zero does not take part in backward."""

    @staticmethod
    def spared(combine):
        def change(sums, context):
            out, back = context.platform.vjp(lambda sums: combine(sums, context), _value(sums))

            def backward(residuals, cotangents, needed):
                return back(cotangents[0]) if cotangents[0].any() else (np.zeros_like(_value(sums)),)

            return context.platform.custom_vjp(lambda x: (out, ()), backward)(sums)

        return change

    core: ClassVar = {"hyperep.exchange.routed:combine_tokens": spared}


@mutant("TOKENS-many")
class RowsBeyondATile(LoopbackPlatform):
    """What does not fit into a tile of 1024 sums is left as it was."""

    def sum_rows(self, x, index, inverse, weights=None):
        out = super().sum_rows(x, index, inverse, weights)
        return out * (np.arange(len(index)) < 1024)[:, None].astype(np.float32) if len(index) > 1024 else out


@mutant("TOKENS-memory", says="alive")
class ContextsKept(LoopbackPlatform):
    @staticmethod
    def kept(dispatch):
        def change(*args, **options):
            found = dispatch(*args, **options)
            found[-1].platform.__dict__.setdefault("contexts", []).append(found[-1])
            return found

        return change

    core: ClassVar = {"hyperep.conformance.requirements.tokens:dispatch_tokens": kept}


@mutant("TOKENS-interleaved")
class LastContextForAll(LoopbackPlatform):
    """What a dispatch leaves is kept in one place: a second one overwrites the first one's."""

    @staticmethod
    def kept(dispatch):
        def change(tokens, *rest, **options):
            *arrived, context = dispatch(tokens, *rest, **options)
            context.platform.last = context
            return *arrived, context

        return change

    core: ClassVar = {
        "hyperep.conformance.requirements.tokens:dispatch_tokens": kept,
        "hyperep.conformance.requirements.tokens:combine_tokens": lambda combine: (
            lambda sums, context: combine(sums, context.platform.last)
        ),
    }


@mutant("TOKENS-deterministic", ranks=4)
class OrderOfAdditionsChanges(LoopbackPlatform):
    """As atomics would: the terms are added in another order each time."""

    def sum_rows(self, x, index, inverse, weights=None):
        self.calls = self.__dict__.get("calls", 0) + 1
        terms = index.shape[1]
        if weights is not None or self.calls % 2:
            return super().sum_rows(x, index, inverse, weights)
        return super().sum_rows(x, index[:, ::-1], inverse // terms * terms + terms - 1 - inverse % terms)


@mutant("TOKENS-float64")
class WeightsThroughFloat32(LoopbackPlatform):
    """All weights travel in float32, beside the numbers."""

    @staticmethod
    def narrow(send):
        def change(context, tokens, indices, weights):
            xp = context.platform.xp
            there, narrowed, numbers = send(context, tokens, indices, xp.astype(weights, xp.float32))
            return there, xp.astype(narrowed, weights.dtype), numbers

        return change

    core: ClassVar = {"hyperep.exchange.tokens:_send": narrow}


@mutant("TOKENS-cost", says="host copies")
class SumsCountedOnTheHost(LoopbackPlatform):
    def sum_rows(self, x, index, inverse, weights=None):
        assert (self.to_host(index)[0] < len(x)).sum() == len(x)
        return super().sum_rows(x, index, inverse, weights)


@mutant("TOKENS-bytes", says="bytes to each rank in forward")
class ChoicesInDoublePrecision(LoopbackPlatform):
    """Numbers and weights of choices travel in float64, also where the weights are float32."""

    @staticmethod
    def wide(send):
        def change(context, tokens, indices, weights):
            xp = context.platform.xp
            there, widened, numbers = send(context, tokens, indices, xp.astype(weights, xp.float64))
            return there, xp.astype(widened, weights.dtype), numbers

        return change

    core: ClassVar = {"hyperep.exchange.tokens:_send": wide}


@mutant("TOKENS-levels", ranks=4)
class SecondLevelSkipped(LoopbackPlatform):
    """Inside a node nothing is sent on, as if each rank owned what its node owns."""

    @staticmethod
    def skipped(over):
        def change(experts, mesh, num_experts):
            inside = mesh.mesh_dim_names == ("ep",) and 1 < mesh.size() < mesh.platform.world_size
            return experts if inside else over(experts, mesh, num_experts)

        return change

    core: ClassVar = {"hyperep.conformance.requirements.tokens:over_ranks": skipped}


@mutant("TOKENS-levels-cost", ranks=4, says="host copies")
class SplitsOfAGroupFromTheHost(LoopbackPlatform):
    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        if group is not None and len(group) < self.world_size:
            self.to_host(np.zeros(1))
        return super().all_to_all_single(x, output_splits, input_splits, group, async_op)


@mutant("FAULT-index-too-large", says="nothing was raised")
class AnyNumberBeyondIsNobody(LoopbackPlatform):
    core: ClassVar = {
        "hyperep.exchange.token_input:CHECK": lambda check: dataclasses.replace(check, judge=lambda *values: None)
    }


@mutant("EP-tokens", says="gradient of this rank's part of w1")
class GradientOfTheBusiestExpertOnly(LoopbackPlatform):
    """The gradient of an expert's weights misses tokens that came from other ranks."""

    def grouped_swiglu(self, x, w1, w2, w3, group_sizes):
        own = self.stop_gradient(w1) if len(_value(x)) > 12 else w1
        return super().grouped_swiglu(x, own, w2, w3, group_sizes)


@mutant("TP-tokens", says="gradient of the weights of choices")
class WeightsOfChoicesNotReduced(LoopbackPlatform):
    """Under tensor parallelism each rank has a part of the gradient of a weight, and keeps it."""

    @staticmethod
    def unreduced(slices):
        def change(experts, platform, group, *, reduce=True):
            def routed(tokens, indices, weights, *, rows=None):
                partial = experts(platform.copy_to_group(tokens, group), indices, weights, rows=rows)
                return platform.reduce_from_group(partial, group)

            return routed

        return change

    core: ClassVar = {"hyperep.styles.tensor:in_slices": unreduced}


@mutant("ETP-tokens", ranks=4)
class SlicesNotAddedUp(LoopbackPlatform):
    """Each rank of tp keeps the sum of its own slices."""

    @staticmethod
    def partial(slices):
        return lambda experts, platform, group, *, reduce=True: slices(experts, platform, group, reduce=False)

    core: ClassVar = {"hyperep.styles.expert_tensor:in_slices": partial}


@mutant("EP-levels", ranks=4)
class ExpertsInTheOrderOfTheOtherDimension(LoopbackPlatform):
    """Tokens are sent inside the node first: the levels are exchanged, and with them who owns what."""

    @staticmethod
    def exchanged(over):
        def change(experts, mesh, num_experts):
            outer = mesh.mesh_dim_names == ("node",)
            routed = over(experts, mesh, num_experts)

            def moved(tokens, indices, weights, *, rows=None):
                if outer and mesh.size() == 2 and mesh.platform.world_size == 4:
                    local = num_experts // 4
                    owner = indices // local
                    owner = np.choose(np.minimum(owner, 4), [0, 2, 1, 3, 4])
                    indices = owner * local + indices % local
                return routed(tokens, indices, weights, rows=rows)

            return moved

        return change

    core: ClassVar = {"hyperep.styles.expert:over_ranks": exchanged}


# ------------------------------------------------------------------------------------------------------- in chunks
class _Arrived:
    def __init__(self, value):
        self.value = value

    def wait(self):
        return self.value


@mutant("EP-chunks")
class ChunkComputedBeforeItArrived(LoopbackPlatform):
    """A wait is left out: experts get what the buffer holds before anything is in it."""

    core: ClassVar = {
        "hyperep.exchange.chunks:Steps": lambda steps: (
            lambda **meant: steps(
                **{**meant, "receive": lambda part, work: _emptied(meant["receive"](part, work))},
            )
        )
    }


def _emptied(arrived):
    return [0 * x for x in arrived] if isinstance(arrived, list) else 0 * arrived


@mutant("EP-chunks")
class ChunksSentInAnotherOrderOnOneRank(LoopbackPlatform):
    """Rank 0 sends the second chunk first: it is computed with what belongs to the first one."""

    @staticmethod
    def swapped(plan):
        def change(*arguments, **options):
            plans = plan(*arguments, **options)
            return plans[::-1] if plans[0].platform.rank == 0 else plans

        return change

    core: ClassVar = {"hyperep.exchange.chunks:plan_dispatch": swapped}


@mutant("EP-chunks", says="gradient of this rank's part")
class GradientOfAChunkLost(LoopbackPlatform):
    """Of the gradients of the experts' weights only the last chunk's is kept."""

    class last:  # noqa: N801 (it stands for the module operator)
        @staticmethod
        def add(a, b):
            return b

        iadd = add

    core: ClassVar = {"hyperep.exchange.chunks:operator": lambda operator: GradientOfAChunkLost.last}


@mutant("EP-chunks-cost", says="nothing was on its way")
class ChunksWaitedForAtOnce(LoopbackPlatform):
    """Every exchange is waited for where it is issued: right, and for nothing."""

    @staticmethod
    def waited(exchange):
        return lambda x, context, async_op=False: _Arrived(exchange(x, context, async_op).wait())

    core: ClassVar = {
        "hyperep.exchange.chunks:to_owners": waited,
        "hyperep.exchange.chunks:from_owners": waited,
    }


@mutant("EP-chunks-cost", says="host copies")
class ChunksCountedOneByOne(LoopbackPlatform):
    """The counts of each chunk are copied to the host by themselves."""

    @staticmethod
    def one_by_one(plan):
        def change(*arguments, **options):
            plans = plan(*arguments, **options)
            for of in plans[1:]:
                of.platform.to_host(of.copies.token)
            return plans

        return change

    core: ClassVar = {"hyperep.exchange.chunks:plan_dispatch": one_by_one}


@mutant("ASYNC-progress", deadline=10)
class ExchangeBeginsWhenItIsWaitedFor(LoopbackPlatform):
    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        if not async_op:
            return super().all_to_all_single(x, output_splits, input_splits, group)
        later = functools.cache(lambda: LoopbackPlatform.all_to_all_single(self, x, output_splits, input_splits, group))
        return type("Later", (), {"wait": lambda work: later()})()


class _Later:
    """An exchange that its platform begins when it is called for something else."""

    def __init__(self, platform, begin):
        self.platform, self.begin, self.work = platform, begin, None

    def advance(self):
        if self.work is None:
            self.work = self.begin()

    def wait(self):
        self.platform.advance()
        self.advance()
        return self.work.wait()


@mutant("ASYNC-progress", deadline=20)
class ExchangesAdvanceInCalls(LoopbackPlatform):
    """As MPI without a thread of its own."""

    def advance(self):
        begun, self.__dict__["begun"] = self.__dict__.get("begun", []), []
        for work in begun:
            work.advance()

    def _post(self, *args, **kwargs):
        self.advance()
        return super()._post(*args, **kwargs)

    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        exchange = functools.partial(LoopbackPlatform.all_to_all_single, self)
        if not async_op:
            return exchange(x, output_splits, input_splits, group)
        _splits(_value(x), input_splits, self.group_size(group), "input_splits")
        later = _Later(self, functools.partial(exchange, np.array(_value(x)), output_splits, input_splits, group, True))
        self.__dict__.setdefault("begun", []).append(later)
        return later


# -------------------------------------------------------------------------------------------------------- balanced
@mutant("EP-copies", says="gradient of this rank's part")
class GradientOfAnExpertsCopyLost(LoopbackPlatform):
    core: ClassVar = {"hyperep.exchange.balanced:plan_lending": lambda plan: lambda *of: _Home(plan(*of), 0)}


@mutant("EP-copies", says="gradient of this rank's part")
class GradientOfAnExpertsCopyDoubled(LoopbackPlatform):
    core: ClassVar = {"hyperep.exchange.balanced:plan_lending": lambda plan: lambda *of: _Home(plan(*of), 2)}


class _Home:
    """A lending whose gradients come home so many times."""

    def __init__(self, lending, times):
        self.lend, self._lending, self._times = lending.lend, lending, times

    def bring_home(self, gradient):
        return self._times * self._lending.bring_home(gradient)


@mutant("EP-copies")
class StaleWeightsOfACopy(LoopbackPlatform):
    """Whoever has had a copy of an expert once keeps its weights."""

    kept: ClassVar = {}

    @staticmethod
    def stale(plan):
        def change(platform, group, placement, rank):
            lending = plan(platform, group, placement, rank)
            names = iter("123")

            def lend(weight):
                fresh = lending.lend(weight)
                key = (platform.rank, placement.slots(rank), weight.shape, next(names))
                return StaleWeightsOfACopy.kept.setdefault(key, fresh)

            return _Stale(lending, lend)

        return change

    core: ClassVar = {"hyperep.exchange.balanced:plan_lending": stale}


class _Stale:
    def __init__(self, lending, lend):
        self.lend, self.bring_home = lend, lending.bring_home


@mutant("EP-copies", deadline=10)
class PlanThatDiffersByRank(LoopbackPlatform):
    """Rank 1 finds that nothing need be copied."""

    @staticmethod
    def differing(balanced):
        class Differing(balanced):
            def _placed(self, tokens, indices, weights):
                placement, order = super()._placed(tokens, indices, weights)
                return (None if self.mesh.platform.rank == 1 else placement), order

        return Differing

    core: ClassVar = {"hyperep.styles.expert:OverRanksBalanced": differing}


@mutant("EP-copies-cost", says="all_to_all_single")
class CopiesThatNobodyNeeds(LoopbackPlatform):
    """Ranks are made even also where they are even enough."""

    core: ClassVar = {
        "hyperep.exchange.balance:plan": lambda plan: (
            lambda counts, *, slots, max_imbalance, rows_per_copy=0: plan(counts, slots=slots, max_imbalance=1.0)
        )
    }
