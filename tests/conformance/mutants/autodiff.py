# SPDX-License-Identifier: Apache-2.0
"""Faults of autodiff, and of the gradients of collectives and permutations."""

from typing import ClassVar

import numpy as np

from hyperep.loopback.platform import LoopbackPlatform, _value
from mutants.registry import mutant


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


@mutant("A2A-grad-zero-rows", deadline=10, says="while others wait")
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
