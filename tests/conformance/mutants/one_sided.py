# SPDX-License-Identifier: Apache-2.0
"""Platforms that leave out a collective of backward on a rank that has nothing to learn."""

import numpy as np

from hyperep.loopback.platform import LoopbackPlatform, _value
from mutants.registry import mutant


@mutant("A2A-grad-zero-cotangent", deadline=10)
class ZerosAreNotExchanged(LoopbackPlatform):
    def differentiable_all_to_all_single(self, x, input_splits, output_splits, group=None):
        def backward(residuals, cotangents, needed):
            (g,) = cotangents
            if not g.any():
                return (np.zeros_like(_value(x)),)
            return (self.all_to_all_single(g, input_splits, output_splits, group),)

        return self.custom_vjp(lambda x: (self.all_to_all_single(x, output_splits, input_splits, group), ()), backward)(
            x
        )


@mutant("TP-pair-zero-cotangent", deadline=10)
class ZerosAreNotReduced(LoopbackPlatform):
    def copy_to_group(self, x, group=None):
        def backward(residuals, cotangents, needed):
            return (self.all_reduce(cotangents[0], group) if cotangents[0].any() else cotangents[0],)

        return self.custom_vjp(lambda x: (x + 0, ()), backward)(x)


@mutant("TP-pair-zero-cotangent")
class ZerosOfOneRankMeanZeros(LoopbackPlatform):
    """All reduce, and a rank whose own cotangent is zero keeps it."""

    def copy_to_group(self, x, group=None):
        def backward(residuals, cotangents, needed):
            total = self.all_reduce(cotangents[0], group)
            return (total if cotangents[0].any() else cotangents[0],)

        return self.custom_vjp(lambda x: (x + 0, ()), backward)(x)


@mutant("CUSTOM-one-sided", deadline=10)
class BackwardOfZerosIsZeros(LoopbackPlatform):
    """A custom backward is linear, so that zeros need no call."""

    def custom_vjp(self, forward, backward):
        def spared(residuals, cotangents, needed):
            if len(needed) == 2 and not any(c.any() for c in cotangents):
                return (None, None)
            return backward(residuals, cotangents, needed)

        return super().custom_vjp(forward, spared)


@mutant("EP-zero-cotangent", deadline=10)
class PullbackOfZeros(LoopbackPlatform):
    """Zeros go in, so zeros come out: nothing is walked through."""

    def vjp(self, function, *primals, parameters=()):
        outputs, pullback = super().vjp(function, *primals, parameters=parameters)

        def spared(*cotangents):
            if len(parameters) == 3 and not any(c.any() for c in cotangents):
                return tuple(np.zeros_like(_value(x)) for x in (*primals, *(p.value for p in parameters)))
            return pullback(*cotangents)

        return outputs, spared


@mutant("EP-zero-cotangent", says="gradient of this rank's part")
class WeightGradientsOnlyForOwnCotangents(LoopbackPlatform):
    """A rank whose own cotangent is zero takes its weights' gradients for zero, although others' rows came to it."""

    def vjp(self, function, *primals, parameters=()):
        outputs, pullback = super().vjp(function, *primals, parameters=parameters)

        def own(*cotangents):
            found = pullback(*cotangents)
            if any(c.any() for c in cotangents):
                return found
            return found[: len(primals)] + tuple(np.zeros_like(g) for g in found[len(primals) :])

        return outputs, own


@mutant("EP-gradients-not-asked")
class GradientsOfAllOrNothing(LoopbackPlatform):
    """Where some weights are constants, the gradient of the rows stops at them."""

    def grouped_swiglu(self, x, w1, w2, w3, group_sizes):
        constant = [isinstance(w, np.ndarray) for w in (w1, w2, w3)]
        return super().grouped_swiglu(x, w1, self.stop_gradient(w2) if any(constant) else w2, w3, group_sizes)
