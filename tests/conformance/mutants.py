# SPDX-License-Identifier: Apache-2.0
"""Faulty platforms, each with one fault that has been seen somewhere, and the requirement that must find it.

A platform with ``core`` puts its fault into the core that runs on it: for each ``module:name`` what makes another
function of the one there. It stands for a platform on which that step comes out so.
"""

import copy
import dataclasses
import importlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hyperep.conformance.target import Target
from hyperep.loopback.array_namespace import array_namespace
from hyperep.loopback.launch import LoopbackLauncher, run
from hyperep.loopback.modules import LoopbackParameter
from hyperep.loopback.platform import CAPABILITIES, LoopbackPlatform, LoopbackWork, _value
from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.errors import UnsupportedCapability


@dataclass(frozen=True)
class Mutant:
    platform: type
    requirement: str
    """The requirement that names the fault."""
    ranks: int = 2
    says: str = ""
    """Words that the finding must contain."""
    deadline: float = 20.0


MUTANTS: dict[str, Mutant] = {}


def mutant(requirement: str, **options) -> Callable[[type], type]:
    def add(platform: type) -> type:
        MUTANTS[platform.__name__] = Mutant(platform, requirement, **options)
        return platform

    return add


class MutantLauncher(LoopbackLauncher):
    """Loopback ranks whose platform is turned into the mutant's before anything runs."""

    def __init__(self, name: str) -> None:
        self.name = name

    def host(self, process, function, platform_name):
        mutated = MUTANTS[self.name].platform
        for place, change in getattr(mutated, "core", {}).items():  # this process is the mutant's own
            module, name = place.split(":")
            module = importlib.import_module(module)
            setattr(module, name, change(getattr(module, name)))

        def on_rank(platform):
            platform.__class__ = mutated
            return function(platform)

        return run(on_rank, len(process.ranks))


def target(name: str, **options) -> Target:
    declared = {c.value: s.value for c, s in CAPABILITIES.items()}
    return Target(name="loopback", launcher=MutantLauncher(name), declared=declared, **options)


def _namespace(**functions):
    namespace = copy.copy(array_namespace)
    for name, function in functions.items():
        setattr(namespace, name, function)
    return namespace


# ------------------------------------------------------------------------------------------------------- autodiff
@mutant("A2A-grad")
class GradientNotReversed(LoopbackPlatform):
    def differentiable_all_to_all_single(self, x, input_splits, output_splits, group=None):
        return self.custom_vjp(
            lambda x: (self.all_to_all_single(x, output_splits, input_splits, group), ()),
            lambda residuals, cotangents, needed: (cotangents[0],),
        )(x)


@mutant("A2A-grad")
class ExchangeDetached(LoopbackPlatform):
    def differentiable_all_to_all_single(self, x, input_splits, output_splits, group=None):
        return self.all_to_all_single(x, output_splits, input_splits, group)


@mutant("A2A-grad")
class GradientAveraged(LoopbackPlatform):
    def differentiable_all_to_all_single(self, x, input_splits, output_splits, group=None):
        return self.custom_vjp(
            lambda x: (self.all_to_all_single(x, output_splits, input_splits, group), ()),
            lambda r, c, needed: (self.all_to_all_single(c[0], input_splits, output_splits, group) / self.world_size,),
        )(x)


@mutant("A2A-grad-zero-rows", deadline=8, says="while others wait")
class ZeroRowsWithoutHistory(LoopbackPlatform):
    """A rank that receives nothing returns a new tensor: its peers wait for it in backward."""

    def differentiable_all_to_all_single(self, x, input_splits, output_splits, group=None):
        out = super().differentiable_all_to_all_single(x, input_splits, output_splits, group)
        return out if sum(output_splits) else np.zeros(out.shape, np.float32)


@mutant("A2A-grad-zero-rows", says="on rank 0 only")
class ErrorOnOneRank(LoopbackPlatform):
    def differentiable_all_to_all_single(self, x, input_splits, output_splits, group=None):
        if sum(input_splits) == 0:
            raise ValueError(f"rank {self.rank} has nothing to send")
        return super().differentiable_all_to_all_single(x, input_splits, output_splits, group)


@mutant("A2A-not-recorded")
class CountsRecorded(LoopbackPlatform):
    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        def plain(x, o=output_splits, i=input_splits):
            return LoopbackPlatform.all_to_all_single(self, x, o, i, group)

        if async_op:
            return super().all_to_all_single(x, output_splits, input_splits, group, True)
        backward = lambda r, c, needed: (plain(c[0], input_splits, output_splits),)  # noqa: E731
        return self.custom_vjp(lambda x: (plain(x), ()), backward)(x)


@mutant("VJP-unused", says="absent")
class GradientNone(LoopbackPlatform):
    def vjp(self, function, *primals, parameters=()):
        outputs, pullback = super().vjp(function, *primals, parameters=parameters)
        return outputs, lambda *c: tuple(g if np.any(g) else None for g in pullback(*c))


@mutant("MOD-unused-parameter")
class ParameterGradientNone(LoopbackPlatform):
    def vjp(self, function, *primals, parameters=()):
        outputs, pullback = super().vjp(function, *primals, parameters=parameters)
        inputs = len(primals)
        return outputs, lambda *c: tuple(g if i < inputs or np.any(g) else None for i, g in enumerate(pullback(*c)))


@mutant("VJP-in-custom-forward", says="gradient of the parameter")
class ParametersLeftUnbound(LoopbackPlatform):
    """What an enclosing vjp traces is forgotten by the one inside of it."""

    def vjp(self, function, *primals, parameters=()):
        outputs, pullback = super().vjp(function, *primals, parameters=parameters)
        for parameter in parameters:
            parameter.bound = parameter.value
        return outputs, pullback


@mutant("CUSTOM-gradients")
class CustomBackwardIgnored(LoopbackPlatform):
    def custom_vjp(self, forward, backward):
        return lambda *inputs: forward(*inputs)[0]


@mutant("CUSTOM-calls")
class ResidualsShared(LoopbackPlatform):
    """Residuals are kept on the function and not with the call: a second call overwrites the first one's."""

    def custom_vjp(self, forward, backward):
        kept = {}

        def keep(*inputs):
            outputs, kept["residuals"] = forward(*inputs)
            return outputs, ()

        return super().custom_vjp(keep, lambda residuals, c, needed: backward(kept["residuals"], c, needed))


@mutant("CUSTOM-freed", says="alive")
class GraphKept(LoopbackPlatform):
    kept: ClassVar = []

    def custom_vjp(self, forward, backward):
        self.kept.append((forward, backward))
        return super().custom_vjp(forward, backward)


@mutant("CUSTOM-not-recorded")
class OutsideRecorded(LoopbackPlatform):
    def custom_vjp(self, forward, backward):
        custom = super().custom_vjp(forward, backward)

        def call(*inputs):
            out = custom(*inputs)
            # As if the tape saw the forward too.
            seen = forward(*(_value(x) for x in inputs))[0]
            return out if isinstance(out, tuple) or not hasattr(seen, "_value") else out + seen - _value(seen)

        return call


@mutant("STOP-gradient")
class GradientNotStopped(LoopbackPlatform):
    def stop_gradient(self, x):
        return x


@mutant("PERM-grad")
class PermutationBackwardByIndex(LoopbackPlatform):
    def permute_rows(self, x, index, inverse):
        return super().permute_rows(x, index, index) if len(index) else super().permute_rows(x, index, inverse)


@mutant("COPY-grad")
class BackwardReductionMissing(LoopbackPlatform):
    def copy_to_group(self, x, group=None):
        return x + 0


@mutant("REDUCE-grad")
class ForwardReductionMissing(LoopbackPlatform):
    def reduce_from_group(self, x, group=None):
        return x + 0


@mutant("REDUCE-grad")
class BackwardReducedTwice(LoopbackPlatform):
    def reduce_from_group(self, x, group=None):
        return self.custom_vjp(
            lambda x: (self.all_reduce(x, group), ()), lambda r, c, needed: (self.all_reduce(c[0], group),)
        )(x)


@mutant("A2A-grad-strided-cotangent")
class CotangentByMemory(LoopbackPlatform):
    """Backward sends the cotangent's memory as it lies there, which for a transposed one is another order."""

    def differentiable_all_to_all_single(self, x, input_splits, output_splits, group=None):
        def backward(residuals, cotangents, needed):
            g = cotangents[0]
            return (self.all_to_all_single(g.ravel(order="K").reshape(g.shape), input_splits, output_splits, group),)

        return self.custom_vjp(lambda x: (self.all_to_all_single(x, output_splits, input_splits, group), ()), backward)(
            x
        )


# -------------------------------------------------------------------------------------------------- communication
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


@mutant("A2A-zero-splits", deadline=8, says="while others wait")
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


@mutant("ASYNC-wait-twice", deadline=3)
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


@mutant("A2A-even", deadline=3, says="in all_to_all_single")
class RankHangs(LoopbackPlatform):
    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        if self.rank == 1:
            time.sleep(600)
        return super().all_to_all_single(x, output_splits, input_splits, group, async_op)


@mutant("AR-sum", says="status 7")
class RankDies(LoopbackPlatform):
    def all_reduce(self, x, group=None, op="sum"):
        os._exit(7)


# ------------------------------------------------------------------------------------------------ host and arrays
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
    xp = _namespace(
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
    xp = _namespace(
        sum=lambda x, *, axis=None, keepdims=False: (
            array_namespace.sum(x, axis=axis, keepdims=keepdims)
            if _value(x).dtype.kind == "f"
            else np.sum(x, axis=axis, keepdims=keepdims, dtype=_value(x).dtype)
        )
    )


@mutant("XP-tanh")
class TanhOverflows(LoopbackPlatform):
    xp = _namespace(tanh=lambda x: (np.exp(2 * x) - 1) / (np.exp(2 * x) + 1))


# ----------------------------------------------------------------------------------------------------------- rows
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


# --------------------------------------------------------------------------------------------- exchange of tokens
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


@mutant("TOKENS-hot-rank", deadline=8, says="while others wait")
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


# -------------------------------------------------------------------------------------------------------- modules
@mutant("MOD-wrap")
class KeywordsDropped(LoopbackPlatform):
    def wrap_forward(self, module, wrapper):
        super().wrap_forward(module, lambda inner, *inputs, **kwargs: wrapper(inner, *inputs))


@mutant("MOD-wrap", says="order")
class FirstWrapperOutermost(LoopbackPlatform):
    def wrap_forward(self, module, wrapper):
        module.wrappers.insert(0, wrapper)


@mutant("MOD-assign")
class AssignRebinds(LoopbackPlatform):
    def assign(self, parameter, value):
        parameter.value = np.array(value)


@mutant("MOD-assign", says="float64")
class AssignedWithItsDtype(LoopbackPlatform):
    def assign(self, parameter, value):
        parameter.value = parameter.bound = np.array(value)


@mutant("MOD-own-values")
class ParametersShared(LoopbackPlatform):
    def make_module(self, name, parameters, forward, **options):
        module = super().make_module(name, parameters, forward, **options)
        for key, tensor in parameters.items():
            module.own_parameters[key].value = module.own_parameters[key].bound = tensor
        return module


@mutant("MOD-gradients")
class GradientsOutOfOrder(LoopbackPlatform):
    def vjp(self, function, *primals, parameters=()):
        if len(parameters) < 2:
            return super().vjp(function, *primals, parameters=parameters)
        in_order = sorted(parameters, key=id)
        outputs, pullback = super().vjp(function, *primals, parameters=list(parameters)[::-1])
        assert in_order
        return outputs, pullback


@mutant("SHARD-parameter")
class ShardingForgotten(LoopbackPlatform):
    def shard_parameter(self, module, name, local, sharding):
        module.own_parameters[name] = LoopbackParameter(_value(local))


@mutant("EP-deterministic")
class NotDeterministic(LoopbackPlatform):
    """As if atomics added the terms, each time in another order."""

    def grouped_swiglu(self, x, w1, w2, w3, group_sizes):
        out = super().grouped_swiglu(x, w1, w2, w3, group_sizes)
        self.calls = self.__dict__.get("calls", 0) + 1
        return out * np.float32(1 + 2e-7 * (self.calls % 3))


# --------------------------------------------------------------------------------------------------- declarations
@mutant("RS-values", says="UNSUPPORTED")
class WorksThoughUnsupported(LoopbackPlatform):
    capabilities: ClassVar = {**CAPABILITIES, Capability.REDUCE_SCATTER: Support.UNSUPPORTED}


@mutant("RS-values", says="declared FULL")
class RefusesThoughDeclared(LoopbackPlatform):
    def reduce_scatter(self, x, group=None):
        raise UnsupportedCapability("loopback", Capability.REDUCE_SCATTER, "not today")


@mutant("ID-capabilities")
class ClaimsMoreThanItsSpec(LoopbackPlatform):
    capabilities: ClassVar = {**CAPABILITIES, Capability.BFLOAT16: Support.FULL}


@mutant("ID-surface")
class MemberMissing(LoopbackPlatform):
    @property
    def sum_rows(self):
        raise AttributeError("sum_rows")
