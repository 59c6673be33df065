# SPDX-License-Identifier: Apache-2.0
"""Platforms whose results are not their own: inputs come back, buffers serve two calls, views follow, inputs change."""

import numpy as np

from hyperep.loopback.array_namespace import array_namespace
from hyperep.loopback.platform import LoopbackPlatform, LoopbackWork, _value
from mutants.registry import mutant, namespace


def _camel(text):
    return "".join(word.capitalize() for word in text.split("_"))


def _alone(member):
    """In a group of one rank there is nothing to do, and the input is returned."""

    def changed(self, x, *args, **kwargs):
        out = getattr(LoopbackPlatform, member)(self, x, *args, **kwargs)
        group = next((a for a in [*args, *kwargs.values()] if isinstance(a, tuple)), None)
        return _value(x) if self.group_size(group) == 1 and not isinstance(out, LoopbackWork) else out

    return changed


def _buffered(member):
    """One buffer for all results of a shape and dtype."""

    def changed(self, x, *args, **kwargs):
        out = getattr(LoopbackPlatform, member)(self, x, *args, **kwargs)
        if not isinstance(out, np.ndarray):
            return out
        buffer = self.__dict__.setdefault(f"{member} {out.shape} {out.dtype}", out)
        buffer[...] = out
        return buffer

    return changed


COLLECTIVES = ("all_to_all_single", "all_gather", "all_reduce", "reduce_scatter", "broadcast")
for member in COLLECTIVES:
    mutant("COLLECTIVES-own-results")(type(f"Alone{_camel(member)}", (LoopbackPlatform,), {member: _alone(member)}))
for requirement, members in (
    ("COLLECTIVES-own-results", COLLECTIVES),
    ("ROWS-own-results", ("permute_rows", "sum_rows")),
):
    for member in members:
        mutant(requirement)(type(f"Buffered{_camel(member)}", (LoopbackPlatform,), {member: _buffered(member)}))


@mutant("COLLECTIVES-own-results", says="broadcast")
class SourceKeepsItsTensor(LoopbackPlatform):
    def broadcast(self, x, source=0, group=None):
        out = super().broadcast(x, source, group)
        return _value(x) if self._members(group).index(self.rank) == source else out


@mutant("COLLECTIVES-own-results")
class LargeResultsAreViews(LoopbackPlatform):
    """What is large stays where the rank that is alone has it."""

    def all_reduce(self, x, group=None, op="sum"):
        out = super().all_reduce(x, group, op)
        return _value(x) if self.group_size(group) == 1 and out.nbytes > 4096 else out


@mutant("COLLECTIVES-own-results")
class TransposedResultsAreViews(LoopbackPlatform):
    def all_gather(self, x, group=None):
        out = super().all_gather(x, group)
        return _value(x) if self.group_size(group) == 1 and not _value(x).flags.c_contiguous else out


@mutant("COLLECTIVES-own-results", says="the input")
class ReducedInPlaceByMax(LoopbackPlatform):
    def all_reduce(self, x, group=None, op="sum"):
        out = super().all_reduce(x, group, op)
        if op == "max" and out.nbytes > 4096:
            _value(x)[...] = out
        return out


@mutant("ASYNC-own-results")
class OneReceiveBuffer(LoopbackPlatform):
    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        work = super().all_to_all_single(x, output_splits, input_splits, group, async_op)
        if not async_op:
            return work

        def finish():
            out = work.wait()
            buffer = self.__dict__.setdefault(f"received {out.shape}", out)
            buffer[...] = out
            return buffer

        return LoopbackWork(finish)


@mutant("HOST-own-results")
class StagingBuffer(LoopbackPlatform):
    def to_host(self, *tensors):
        found = []
        for number, array in enumerate(super().to_host(*tensors)):
            buffer = self.__dict__.setdefault(f"staged {number} {array.shape} {array.dtype}", array)
            buffer[...] = array
            found.append(buffer)
        return tuple(found)


@mutant("HOST-own-results")
class LargeCopiesAreViews(LoopbackPlatform):
    def to_host(self, *tensors):
        return tuple(_value(x) if _value(x).nbytes > 4096 else np.array(_value(x)) for x in tensors)


@mutant("HOST-own-results")
class TransposedCopiesAreViews(LoopbackPlatform):
    def to_host(self, *tensors):
        return tuple(np.array(_value(x)) if _value(x).flags.c_contiguous else _value(x) for x in tensors)


@mutant("HOST-own-results", says="after the array was overwritten")
class LargeArraysAreAdopted(LoopbackPlatform):
    def from_host(self, array):
        return array if array.nbytes > 100_000 else super().from_host(array)


@mutant("HOST-own-results", says="after the array was overwritten")
class StridedArraysAreAdopted(LoopbackPlatform):
    def from_host(self, array):
        return super().from_host(array) if array.flags.c_contiguous else array


@mutant("HOST-own-results")
class SameTensorSameArray(LoopbackPlatform):
    """A tensor that is asked for twice is copied once."""

    def to_host(self, *tensors):
        copies = {}
        return tuple(copies.setdefault(id(x), np.array(_value(x))) for x in tensors)


@mutant("XP-own-results", says="astype")
class AstypeReturnsItsInput(LoopbackPlatform):
    xp = namespace(astype=lambda x, dtype, *, copy=True: x if x.dtype == dtype else array_namespace.astype(x, dtype))


def _in_one_buffer():
    buffers = {}

    def exp(x):
        out = array_namespace.exp(x)
        if not isinstance(out, np.ndarray):
            return out
        buffer = buffers.setdefault(out.shape, out)
        buffer[...] = out
        return buffer

    return exp


@mutant("XP-own-results", ranks=1)
class ExponentialsInOneBuffer(LoopbackPlatform):
    xp = namespace(exp=_in_one_buffer())


@mutant("ROWS-own-results")
class IdentityReturnsItsInput(LoopbackPlatform):
    def permute_rows(self, x, index, inverse):
        return x if (index == np.arange(len(index))).all() else super().permute_rows(x, index, inverse)


@mutant("ROWS-own-results")
class SumOfOneIsTheRows(LoopbackPlatform):
    def sum_rows(self, x, index, inverse, weights=None):
        alone = weights is None and index.shape[1] == 1 and np.array_equal(index.ravel(), np.arange(len(x)))
        return x if alone else super().sum_rows(x, index, inverse, weights)


def _gradient_buffer(member, inputs):
    """Gradients of the first inputs are written into one buffer for each shape."""

    def changed(self, *args):
        def once(number):
            def backward(residuals, cotangents, needed):
                g = np.array(cotangents[0])
                buffer = self.__dict__.setdefault(f"{member} {number} {g.shape}", g)
                buffer[...] = g
                return (buffer,)

            return self.custom_vjp(lambda x: (x + 0, ()), backward)

        given = [once(n)(x) if n < inputs else x for n, x in enumerate(args)]
        return getattr(LoopbackPlatform, member)(self, *given)

    return changed


for requirement, member, inputs in (
    ("ROWS-own-results", "swiglu", 1),
    ("ROWS-own-results", "grouped_swiglu", 1),
    ("GRADIENTS-own-results", "copy_to_group", 1),
    ("GRADIENTS-own-results", "differentiable_all_to_all_single", 1),
):
    mutant(requirement)(
        type(f"GradientBuffer{_camel(member)}", (LoopbackPlatform,), {member: _gradient_buffer(member, inputs)})
    )


@mutant("ROWS-own-results", says="the cotangent")
class CotangentScaledInPlace(LoopbackPlatform):
    def swiglu(self, gate, up):
        out = super().swiglu(gate, up)

        def backward(residuals, cotangents, needed):
            (g,) = cotangents
            halved = g.copy()
            g *= 2
            return (halved,)

        return self.custom_vjp(lambda x: (x + 0, ()), backward)(out)


@mutant("ROWS-own-results", says="input 1")
class GateOverwritten(LoopbackPlatform):
    """What is large is computed where the gate lies."""

    def swiglu(self, gate, up):
        value = _value(gate)
        if value.nbytes < 4096:
            return super().swiglu(gate, up)
        out = super().swiglu(np.array(value) if isinstance(gate, np.ndarray) else gate, up)
        kept = self.custom_vjp(lambda x: (x + 0, ()), lambda r, c, needed: (value.__setitem__(..., 0), c[0])[1:])
        return kept(out)


@mutant("GRADIENTS-own-results", says="after other calls")
class GradientsInOneBuffer(LoopbackPlatform):
    def vjp(self, function, *primals, parameters=()):
        outputs, pullback = super().vjp(function, *primals, parameters=parameters)

        def buffered(*cotangents):
            found = []
            for number, g in enumerate(pullback(*cotangents)):
                buffer = self.__dict__.setdefault(f"gradient {number} {g.shape} {g.dtype}", np.array(g))
                buffer[...] = g
                found.append(buffer)
            return tuple(found)

        return outputs, buffered


@mutant("GRADIENTS-own-results", says="copy_to_group")
class CopyIsItsInput(LoopbackPlatform):
    def copy_to_group(self, x, group=None):
        return self.custom_vjp(lambda x: (x, ()), lambda r, c, needed: (self.all_reduce(c[0], group),))(x)


@mutant("GRADIENTS-own-results", says="copy_to_group")
class CopyIsAView(LoopbackPlatform):
    def copy_to_group(self, x, group=None):
        return self.custom_vjp(lambda x: (x[:], ()), lambda r, c, needed: (self.all_reduce(c[0], group),))(x)


@mutant("GRADIENTS-own-results", says="copy_to_group in the world, recorded")
class RecordedCopyIsItsInput(LoopbackPlatform):
    """Right where nobody differentiates it."""

    def copy_to_group(self, x, group=None):
        if isinstance(x, np.ndarray):
            return super().copy_to_group(x, group)
        return self.custom_vjp(lambda x: (x, ()), lambda r, c, needed: (self.all_reduce(c[0], group),))(x)


@mutant("GRADIENTS-own-results", says="reduce_from_group in a group of one rank")
class SumOfOneRankIsItsInput(LoopbackPlatform):
    def reduce_from_group(self, x, group=None):
        if self.group_size(group) > 1:
            return super().reduce_from_group(x, group)
        return self.custom_vjp(lambda x: (x, ()), lambda r, c, needed: (c[0],))(x)


@mutant("MOD-own-memory", says="assigned")
class AssignedTensorsAreAdopted(LoopbackPlatform):
    def assign(self, parameter, value):
        value = _value(value)
        if value.dtype == parameter.value.dtype and value.shape == parameter.value.shape:
            parameter.value = parameter.bound = value
        else:
            super().assign(parameter, value)


@mutant("MOD-own-memory", says="holds")
class LargeBuffersAreAdopted(LoopbackPlatform):
    def make_module(self, name, parameters, forward, *, children=None, buffers=None, description=""):
        module = super().make_module(
            name, parameters, forward, children=children, buffers=buffers, description=description
        )
        for key, tensor in (buffers or {}).items():
            if tensor.nbytes > 4096:
                module.own_buffers[key].value = module.own_buffers[key].bound = tensor
        return module


@mutant("GRADIENTS-own-results", says="differentiable_all_to_all_single in a group of one rank")
class ExchangeOfOneRankIsItsInput(LoopbackPlatform):
    def differentiable_all_to_all_single(self, x, input_splits, output_splits, group=None):
        if self.group_size(group) > 1:
            return super().differentiable_all_to_all_single(x, input_splits, output_splits, group)
        return self.custom_vjp(lambda x: (x, ()), lambda r, c, needed: (c[0] + 0,))(x)
