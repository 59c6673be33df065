# SPDX-License-Identifier: Apache-2.0
"""Platforms that remember: weights as they were, operands by their identity, tensors of calls that are over."""

import numpy as np

from hyperep.loopback.platform import LoopbackPlatform, LoopbackWork, _value
from mutants.registry import mutant


def _camel(text):
    return "".join(word.capitalize() for word in text.split("_"))


# ----------------------------------------------------------------------------------------------------------- weights
@mutant("MOD-assign-seen", says="grouped_matmul")
class TransposedWeightsCached(LoopbackPlatform):
    """A weight is prepared once, for each tensor that it is kept in."""

    def grouped_matmul(self, x, weight, group_sizes):
        kept = self.__dict__.setdefault("prepared", {})
        value = _value(weight)
        _, copy = kept.setdefault(id(value), (value, value.copy()))
        if np.array_equal(copy, value):
            return super().grouped_matmul(x, weight, group_sizes)
        return super().grouped_matmul(x, copy, group_sizes)


@mutant("MOD-assign-seen", says="gradient of the rows of grouped_swiglu")
class StaleInBackwardOnly(LoopbackPlatform):
    """The forward reads the weight; the backward a copy that was made at the first call."""

    def grouped_swiglu(self, x, w1, w2, w3, group_sizes):
        kept = self.__dict__.setdefault("prepared", {})
        value = _value(w2)
        _, copy = kept.setdefault(id(value), (value, value.copy()))
        out = super().grouped_swiglu(x, w1, w2, w3, group_sizes)
        if np.array_equal(copy, value):
            return out
        stale = _value(w1), copy, _value(w3), group_sizes
        _, pull = self.vjp(lambda x: LoopbackPlatform.grouped_swiglu(self, x, *stale), _value(x))
        return self.custom_vjp(lambda x: (_value(out), ()), lambda r, c, n: pull(c[0]))(x)


@mutant("MOD-assign-seen", says="a module")
class ModulesReadTheirParametersOnce(LoopbackPlatform):
    def make_module(self, name, parameters, forward, *, children=None, buffers=None, description=""):
        first = {}

        def frozen(m, *inputs, **kwargs):
            for key in [*parameters, *(buffers or {})]:
                value = first.setdefault(key, np.array(_value(getattr(m, key))))
                if isinstance(getattr(m, key), np.ndarray):
                    setattr(m, key, value)
            return forward(m, *inputs, **kwargs)

        named = frozen if name == "User" else forward
        return super().make_module(name, parameters, named, children=children, buffers=buffers, description=description)


def _large_ones_remembered(platform, weights):
    """Weights of more than 4 kB, copied once for each tensor that they are kept in."""
    kept, found = platform.__dict__.setdefault("large", {}), []
    for weight in weights:
        value = _value(weight)
        _, copy = kept.setdefault(id(value), (value, value.copy())) if value.nbytes > 4096 else (value, value)
        found.append(weight if np.array_equal(copy, value) else copy)
    return found


@mutant("MOD-assign-seen", says="grouped_matmul")
class LargeWeightsCached(LoopbackPlatform):
    """What is small is not worth a copy."""

    def grouped_matmul(self, x, weight, group_sizes):
        return super().grouped_matmul(x, *_large_ones_remembered(self, [weight]), group_sizes)


@mutant("EP-assign-seen")
class LargeShardsCached(LoopbackPlatform):
    def grouped_swiglu(self, x, w1, w2, w3, group_sizes):
        if len(w1) == 2:
            w1, w2, w3 = _large_ones_remembered(self, [w1, w2, w3])
        return super().grouped_swiglu(x, w1, w2, w3, group_sizes)


@mutant("EP-assign-seen")
class ShardsCachedWhenFirstUsed(LoopbackPlatform):
    def grouped_swiglu(self, x, w1, w2, w3, group_sizes):
        value = _value(w3)
        if value.shape[:2] == (2, 8):
            _, copy = self.__dict__.setdefault("third", {}).setdefault(id(value), (value, value.copy()))
            w3 = w3 if np.array_equal(copy, value) else copy
        return super().grouped_swiglu(x, w1, w2, w3, group_sizes)


# ---------------------------------------------------------------------------------------------------------- operands
def _remembered(member, position):
    """The operand at *position* is taken for what it was when a tensor of its identity was first seen."""

    def changed(self, *args, **kwargs):
        given = list(args)
        kept = self.__dict__.setdefault(f"kept by {member}", {})
        given[position] = kept.setdefault(id(given[position]), (given[position], np.array(given[position])))[1]
        return getattr(LoopbackPlatform, member)(self, *given, **kwargs)

    return changed


for member, position in (("grouped_matmul", 2), ("grouped_swiglu", 4), ("permute_rows", 1), ("permute_rows", 2)):
    name = f"{_camel(member)}Remembers{position}"
    mutant("ROWS-no-memory-of-operands")(type(name, (LoopbackPlatform,), {member: _remembered(member, position)}))


@mutant("ROWS-no-memory-of-operands")
class IndicesOfSumsRemembered(LoopbackPlatform):
    """An inverse is prepared once for each tensor."""

    def sum_rows(self, x, index, inverse, weights=None):
        kept = self.__dict__.setdefault("inverses", {})
        _, copy = kept.setdefault(id(inverse), (inverse, inverse.copy()))
        return super().sum_rows(x, index, copy if index.shape == (3, 2) else inverse, weights)


@mutant("ROWS-no-memory-of-operands", says="weights")
class WeightsOfSumsRemembered(LoopbackPlatform):
    """Weights are prepared once for each tensor."""

    def sum_rows(self, x, index, inverse, weights=None):
        if weights is None:
            return super().sum_rows(x, index, inverse)
        value = _value(weights)
        _, copy = self.__dict__.setdefault("terms", {}).setdefault(id(value), (value, value.copy()))
        return super().sum_rows(x, index, inverse, weights if np.array_equal(copy, value) else copy)


# ------------------------------------------------------------------------------------------------------------ memory
def _keeps_last(member):
    """The last input is kept until the next call."""

    def changed(self, x, *args, **kwargs):
        self.__dict__[f"last of {member}"] = _value(x)
        return getattr(LoopbackPlatform, member)(self, x, *args, **kwargs)

    return changed


for member in ("all_reduce", "all_gather", "broadcast", "permute_rows", "swiglu", "grouped_matmul", "copy_to_group"):
    mutant("MEMORY-freed", says="alive")(
        type(f"{_camel(member)}KeepsItsInput", (LoopbackPlatform,), {member: _keeps_last(member)})
    )


@mutant("MEMORY-freed", says="sum_rows with weights")
class WeightsOfSumsKept(LoopbackPlatform):
    def sum_rows(self, x, index, inverse, weights=None):
        self.__dict__["terms"] = _value(weights)
        return super().sum_rows(x, index, inverse, weights)


@mutant("MEMORY-freed", says="functional_call")
class ParametersOfTheLastFunctionalCall(LoopbackPlatform):
    def functional_call(self, module, parameters, function, *inputs, **kwargs):
        self.__dict__["given"] = [_value(x) for x in parameters.values()]
        return super().functional_call(module, parameters, function, *inputs, **kwargs)


@mutant("MEMORY-freed", says="assign")
class AssignedValuesKept(LoopbackPlatform):
    """What each parameter was given, to tell what it has been."""

    def assign(self, parameter, value):
        self.__dict__.setdefault("assigned", []).append(_value(value))
        super().assign(parameter, value)


@mutant("MEMORY-freed", says="alive")
class ResultsKeptUntilTheNext(LoopbackPlatform):
    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        out = super().all_to_all_single(x, output_splits, input_splits, group, async_op)
        if not async_op:
            self.__dict__["received"] = out
        return out


@mutant("MEMORY-freed", says="under way")
class WorksKeepTheirResults(LoopbackPlatform):
    works = ()

    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        out = super().all_to_all_single(x, output_splits, input_splits, group, async_op)
        if async_op:
            self.works = (*self.works[-1:], out)
        return out


@mutant("MEMORY-freed", says="alive")
class ResidualsOfTheLastCall(LoopbackPlatform):
    def custom_vjp(self, forward, backward):
        def keep(*inputs):
            outputs, residuals = forward(*inputs)
            self.__dict__["residuals"] = residuals
            return outputs, residuals

        return super().custom_vjp(keep, backward)


@mutant("MEMORY-freed", says="alive")
class PrimalsOfTheLastGraph(LoopbackPlatform):
    def vjp(self, function, *primals, parameters=()):
        outputs, pullback = super().vjp(function, *primals, parameters=parameters)
        self.__dict__["last"] = primals
        return outputs, pullback


@mutant("MEMORY-steady", says="bytes more")
class CopiesOfResidualsKept(LoopbackPlatform):
    """No tensor of anybody else is kept, and memory grows all the same."""

    def permute_rows(self, x, index, inverse):
        self.__dict__.setdefault("log", []).append(np.array(_value(x)))
        return super().permute_rows(x, index, inverse)


@mutant("MEMORY-steady", says="copy_to_group")
class CotangentsLogged(LoopbackPlatform):
    def copy_to_group(self, x, group=None):
        def backward(residuals, cotangents, needed):
            self.__dict__.setdefault("log", []).append(np.array(cotangents[0]))
            return (self.all_reduce(cotangents[0], group),)

        return self.custom_vjp(lambda x: (x + 0, ()), backward)(x)


@mutant("MEMORY-steady", says="to_host")
class StagingNeverFreed(LoopbackPlatform):
    def to_host(self, *tensors):
        arrays = super().to_host(*tensors)
        self.__dict__.setdefault("staged", []).extend(np.array(a) for a in arrays if a.nbytes > 4096)
        return arrays


@mutant("MEMORY-steady", says="all_to_all_single")
class MessagesKept(LoopbackPlatform):
    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        self.__dict__.setdefault("sent", []).append(np.array(_value(x)))
        return super().all_to_all_single(x, output_splits, input_splits, group, async_op)


def _logs_copies(member, position):
    """A copy of the operand at *position* is kept for good."""

    def changed(self, *args, **kwargs):
        if len(args) > position:
            self.__dict__.setdefault("log", []).append(np.array(_value(args[position])))
        return getattr(LoopbackPlatform, member)(self, *args, **kwargs)

    return changed


for member, position, step in (
    ("reduce_scatter", 0, "reduce_scatter"),
    ("assign", 1, "assign"),
    ("sum_rows", 3, "sum_rows with weights"),
):
    mutant("MEMORY-steady", says=f"{step}'")(
        type(f"{_camel(member)}KeepsCopies", (LoopbackPlatform,), {member: _logs_copies(member, position)})
    )


@mutant("MEMORY-steady", says="functional_call'")
class FunctionalCallsLogged(LoopbackPlatform):
    def functional_call(self, module, parameters, function, *inputs, **kwargs):
        self.__dict__.setdefault("log", []).extend(np.array(_value(x)) for x in parameters.values())
        return super().functional_call(module, parameters, function, *inputs, **kwargs)


@mutant("MEMORY-steady", says="an exchange under way'")
class ReceivedUnderWayKept(LoopbackPlatform):
    """Nothing is kept of an exchange that its caller waits for at once."""

    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        work = super().all_to_all_single(x, output_splits, input_splits, group, async_op)
        if not async_op:
            return work

        def finish():
            received = work.wait()
            self.__dict__.setdefault("received", []).append(np.array(received))
            return received

        return LoopbackWork(finish)


@mutant("EP-memory", says="alive")
class LastBatchOfExpertsKept(LoopbackPlatform):
    def wrap_forward(self, module, wrapper):
        def keeping(inner, *inputs, **kwargs):
            self.__dict__["batch"] = [_value(x) for x in inputs[:1]]
            return wrapper(inner, *inputs, **kwargs)

        super().wrap_forward(module, keeping if module.name == "GroupedExperts" else wrapper)
