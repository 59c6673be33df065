# SPDX-License-Identifier: Apache-2.0
"""Platforms that are narrower inside than they look: results are of the right dtype, and bits of them are gone."""

from typing import Any

import numpy as np

from hyperep.loopback.array_namespace import array_namespace
from hyperep.loopback.platform import LoopbackPlatform, LoopbackWork, _value
from mutants.registry import mutant, namespace


def through(platform: Any, x: Any, dtype: Any, narrow: Any) -> Any:
    """*x*, and its gradient, by way of *narrow* if it is of *dtype*."""
    if not hasattr(x, "dtype") or x.dtype != np.dtype(dtype):
        return x
    return platform.xp.astype(platform.xp.astype(x, np.dtype(narrow)), np.dtype(dtype))


def narrowed(requirement: str, member: str, dtype: str, narrow: str, position: int = 0, **options: Any) -> None:
    """A mutant whose *member* takes its operand at *position* by way of *narrow*."""

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = list(args)
        if position < len(given):
            given[position] = through(self, given[position], dtype, narrow)
        return getattr(LoopbackPlatform, member)(self, *given, **kwargs)

    words = "".join(word.capitalize() for word in f"{member}_{dtype}_through_{narrow}".split("_"))
    mutant(requirement, **options)(type(f"{words}{position or ''}", (LoopbackPlatform,), {member: changed}))


for member, requirement in (
    ("all_to_all_single", "A2A-bits"),
    ("all_gather", "AG-bits"),
    ("reduce_scatter", "RS-bits"),
    ("all_reduce", "AR-bits"),
    ("broadcast", "BC-bits"),
    ("permute_rows", "PERM-bits"),
    ("from_host", "HOST-bits"),
    ("to_host", "HOST-bits"),
):
    for dtype, narrow in (("float64", "float32"), ("int64", "float64"), ("int32", "float32"), ("float32", "float16")):
        if dtype == "float64" or (member not in ("from_host", "to_host") and narrow != "float16"):
            narrowed(requirement, member, dtype, narrow)
narrowed("A2A-bits", "all_to_all_single", "float32", "float16")
narrowed("A2A-grad-bits", "differentiable_all_to_all_single", "float64", "float32")
narrowed("TP-pair-bits", "copy_to_group", "float64", "float32")
narrowed("TP-pair-bits", "reduce_from_group", "float64", "float32")
narrowed("VJP-bits", "stop_gradient", "float64", "float32")
narrowed("MOD-bits", "assign", "float64", "float32", 1)
narrowed("MOD-bits", "assign", "int64", "float64", 1)
narrowed("SHARD-bits", "shard_parameter", "float64", "float32", 2)
narrowed("SHARD-bits", "shard_parameter", "int64", "float32", 2)
narrowed("SUM-rows-no-row", "sum_rows", "int64", "float32", says="sums of integers")
narrowed("SUM-rows-float64", "sum_rows", "float64", "float32")
narrowed("SUM-rows-weights", "sum_rows", "float64", "float32", 3)
narrowed("GMM-float64", "grouped_matmul", "float64", "float32")
narrowed("GMM-float64", "grouped_matmul", "float64", "float32", 1)
narrowed("GMM-float64", "grouped_swiglu", "float64", "float32")
narrowed("GMM-float64", "swiglu", "float64", "float32", 1)


@mutant("A2A-bits", says="under way")
class OnlyWhatIsUnderWayIsNarrow(LoopbackPlatform):
    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        out = super().all_to_all_single(x, output_splits, input_splits, group)
        return LoopbackWork(lambda: through(self, out, "float64", "float32")) if async_op else out


@mutant("A2A-grad-bits", says="gradient")
class ExchangedBackInFloat32(LoopbackPlatform):
    def differentiable_all_to_all_single(self, x, input_splits, output_splits, group=None):
        def backward(residuals, cotangents, needed):
            g = through(self, cotangents[0], "float64", "float32")
            return (self.all_to_all_single(g, input_splits, output_splits, group),)

        return self.custom_vjp(lambda x: (self.all_to_all_single(x, output_splits, input_splits, group), ()), backward)(
            x
        )


@mutant("TP-pair-bits", says="gradient of copy_to_group")
class CotangentsReducedInFloat32(LoopbackPlatform):
    def copy_to_group(self, x, group=None):
        def backward(residuals, cotangents, needed):
            return (self.all_reduce(through(self, cotangents[0], "float64", "float32"), group),)

        return self.custom_vjp(lambda x: (x + 0, ()), backward)(x)


@mutant("PERM-grad-bits")
class PermutedBackInFloat32(LoopbackPlatform):
    def permute_rows(self, x, index, inverse):
        narrow = self.custom_vjp(lambda x: (x + 0, ()), lambda r, c, n: (through(self, c[0], "float64", "float32"),))
        return super().permute_rows(narrow(x), index, inverse)


@mutant("AR-bits", says="max")
class MaximumInFloat64(LoopbackPlatform):
    """Integers are compared as floats; sums are right."""

    def all_reduce(self, x, group=None, op="sum"):
        narrow = op == "max" and _value(x).dtype == np.int64
        return super().all_reduce(through(self, x, "int64", "float64") if narrow else x, group, op)


@mutant("VJP-bits", says="of residuals")
class ResidualsInFloat32(LoopbackPlatform):
    def custom_vjp(self, forward, backward):
        def keep(*inputs):
            outputs, residuals = forward(*inputs)
            return outputs, tuple(through(self, r, "float64", "float32") for r in residuals)

        return super().custom_vjp(keep, backward)


@mutant("VJP-bits", says="custom_vjp")
class CotangentsInFloat32(LoopbackPlatform):
    def custom_vjp(self, forward, backward):
        def narrow(residuals, cotangents, needed):
            return backward(residuals, tuple(through(self, c, "float64", "float32") for c in cotangents), needed)

        return super().custom_vjp(forward, narrow)


@mutant("VJP-bits", says="gradient of vjp")
class GradientsInFloat32(LoopbackPlatform):
    def vjp(self, function, *primals, parameters=()):
        outputs, pullback = super().vjp(function, *primals, parameters=parameters)
        return outputs, lambda *c: tuple(through(self, g, "float64", "float32") for g in pullback(*c))


@mutant("MOD-bits", says="float64")
class ModulesOfFloat32(LoopbackPlatform):
    def make_module(self, name, parameters, forward, *, children=None, buffers=None, description=""):
        narrow = {key: through(self, value, "float64", "float32") for key, value in parameters.items()}
        return super().make_module(name, narrow, forward, children=children, buffers=buffers, description=description)


@mutant("MOD-bits", says="int64")
class BuffersOfFloats(LoopbackPlatform):
    def make_module(self, name, parameters, forward, *, children=None, buffers=None, description=""):
        narrow = {key: through(self, value, "int64", "float32") for key, value in (buffers or {}).items()}
        return super().make_module(
            name, parameters, forward, children=children, buffers=narrow, description=description
        )


@mutant("STYLES-float64")
class ExpertsNarrowWhereSharded(LoopbackPlatform):
    """Experts in float64 are whole, until a style has sharded them."""

    def shard_parameter(self, module, name, local, sharding):
        super().shard_parameter(module, name, local, sharding)
        self.__dict__["sharded"] = module.name == "Experts"

    def grouped_swiglu(self, x, w1, w2, w3, group_sizes):
        out = super().grouped_swiglu(x, w1, w2, w3, group_sizes)
        return through(self, out, "float64", "float32") if self.__dict__.get("sharded") else out


def _narrow(name: str, dtype: str, narrow: str) -> Any:
    function = getattr(array_namespace, name)

    def changed(x, *args, **kwargs):
        if _value(x).dtype != np.dtype(dtype):
            return function(x, *args, **kwargs)
        out = function(array_namespace.astype(x, np.dtype(narrow)), *args, **kwargs)
        return array_namespace.astype(out, np.dtype(dtype)) if _value(out).dtype == np.dtype(narrow) else out

    return changed


for function, dtype, narrow, requirement in (
    ("exp", "float64", "float32", "XP-float64"),
    ("mean", "float64", "float32", "XP-float64"),
    ("reshape", "float64", "float32", "XP-float64"),
    ("argsort", "int64", "float64", "XP-int64"),
    ("sum", "int64", "float64", "XP-int64"),
    ("cumulative_sum", "int64", "int32", "XP-int64"),
    ("take", "int64", "float64", "XP-int64"),
    ("searchsorted", "int64", "float64", "XP-int64"),
):
    changed = namespace(**{function: _narrow(function, dtype, narrow)})
    words = "".join(word.capitalize() for word in f"xp_{function}_{dtype}_through_{narrow}".split("_"))
    mutant(requirement)(type(words, (LoopbackPlatform,), {"xp": changed}))


@mutant("XP-grad-elementwise", says="float64")
class DerivativesInFloat32(LoopbackPlatform):
    xp = namespace(
        sqrt=LoopbackPlatform().custom_vjp(
            lambda x: (np.sqrt(x), (x,)),
            lambda r, c, n: ((c[0] / (2 * np.sqrt(r[0]))).astype(np.float32).astype(c[0].dtype),),
        )
    )


@mutant("XP-argsort", says="int64")
class DescendingIsAscendingReversed(LoopbackPlatform):
    """Equal values come in the reversed order, which is stable in no sense."""

    xp = namespace(
        argsort=lambda x, *, axis=-1, descending=False, stable=True: (
            np.flip(np.argsort(_value(x), axis=axis, kind="stable"), axis).copy()
            if descending
            else array_namespace.argsort(x, axis=axis)
        )
    )


@mutant("XP-argsort")
class QuickSort(LoopbackPlatform):
    """Unstable only where there are more than sixteen elements."""

    xp = namespace(
        argsort=lambda x, *, axis=-1, descending=False, stable=True: (
            array_namespace.argsort(x, axis=axis, descending=True)
            if descending
            else np.argsort(_value(x), axis=axis, kind="quicksort").astype(np.int64)
        )
    )


def _by_float32(kinds):
    """astype between dtypes of these kinds by way of float32."""

    def astype(x, dtype, *, copy=True):
        value, dtype = _value(x), np.dtype(dtype)
        if value.dtype != dtype and (value.dtype.kind, dtype.kind) in kinds:
            x = array_namespace.astype(x, np.dtype("float32"))
        return array_namespace.astype(x, dtype)

    return namespace(astype=astype)


@mutant("XP-astype")
class IntegersBecomeOthersByFloat32(LoopbackPlatform):
    xp = _by_float32({("i", "i")})


@mutant("XP-float64", says="astype")
class IntegersBecomeFloat64ByFloat32(LoopbackPlatform):
    xp = _by_float32({("i", "f")})


@mutant("XP-float64", says="astype")
class Float64BecomesIntegersByFloat32(LoopbackPlatform):
    xp = _by_float32({("f", "i")})


def _sub(platform, x, group):
    return through(platform, x, "float64", "float32") if platform.group_size(group) < platform.world_size else x


@mutant("GROUP-collectives", says="gathered")
class GatheredInGroupsInFloat32(LoopbackPlatform):
    def all_gather(self, x, group=None):
        return super().all_gather(_sub(self, x, group), group)


@mutant("GROUP-collectives", says="sum over the group")
class SummedInGroupsInFloat32(LoopbackPlatform):
    def all_reduce(self, x, group=None, op="sum"):
        return super().all_reduce(_sub(self, x, group) if op == "sum" else x, group, op)


@mutant("MOD-local-gradients", says="gradient of the parameter")
class GradientThroughLocalInFloat32(LoopbackPlatform):
    def local(self, parameter):
        out = super().local(parameter)
        if _value(out).dtype != np.float64 or isinstance(out, np.ndarray):
            return out
        narrow = lambda r, c, needed: (through(self, c[0], "float64", "float32"),)  # noqa: E731
        return self.custom_vjp(lambda x: (x + 0, ()), narrow)(out)


@mutant("SHARD-assign-values", says="float64")
class ShardsTakeFloat64(LoopbackPlatform):
    def assign(self, parameter, value):
        super().assign(parameter, value)
        if getattr(parameter, "sharding", None) is not None and _value(value).dtype == np.float64:
            parameter.value = parameter.bound = np.array(_value(value))
