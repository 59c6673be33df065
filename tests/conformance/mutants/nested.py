# SPDX-License-Identifier: Apache-2.0
"""Platforms whose vjp does not know of another one, or of what it was not asked for."""

from autograd.tracer import isbox

from hyperep.loopback.platform import LoopbackPlatform
from mutants.registry import mutant


@mutant("VJP-in-vjp")
class InnerResultsAreRecorded(LoopbackPlatform):
    """What an inner vjp returns carries the gradient of an outer one, where the inner function is called again."""

    def vjp(self, function, *primals, parameters=()):
        outputs, pullback = super().vjp(function, *primals, parameters=parameters)
        if any(isbox(x) for x in primals) and not parameters:
            again = function(*primals)
            outputs = again if isbox(again) else outputs
        return outputs, pullback


@mutant("VJP-in-vjp", says="inner vjp")
class OneTapeForAll(LoopbackPlatform):
    def vjp(self, function, *primals, parameters=()):
        if self.__dict__.get("recording"):
            raise RuntimeError("a tape is being recorded: an inner vjp")
        self.__dict__["recording"] = True
        try:
            return super().vjp(function, *primals, parameters=parameters)
        finally:
            self.__dict__["recording"] = False


@mutant("VJP-in-vjp", says="gradient")
class InnerClearsTheTape(LoopbackPlatform):
    """When an inner one has been pulled back, the outer one has lost what it had recorded before."""

    def vjp(self, function, *primals, parameters=()):
        nested = any(isbox(x) for x in primals)
        state = self.__dict__
        outputs, pullback = super().vjp(function, *primals, parameters=parameters)
        lost = state.pop("lost", False)
        if nested:
            state["lost"] = True
        return outputs, lambda *c: tuple(g * (0 if lost and n == 0 else 1) for n, g in enumerate(pullback(*c)))


@mutant("VJP-in-custom-backward", says="gradient")
class TheLastPullbackForAll(LoopbackPlatform):
    """A pullback runs the graph that was recorded last, and takes it away."""

    def vjp(self, function, *primals, parameters=()):
        outputs, pullback = super().vjp(function, *primals, parameters=parameters)
        if len(primals) != 1 or len(parameters) != 1:
            return outputs, pullback
        graphs = self.__dict__.setdefault("graphs", [])
        graphs.append(pullback)

        def last(*cotangents):
            return graphs.pop()(*cotangents)

        return outputs, last


@mutant("VJP-parameters-not-asked")
class GradientsAddUp(LoopbackPlatform):
    """A gradient that was asked for before is still there, and is added."""

    def vjp(self, function, *primals, parameters=()):
        outputs, pullback = super().vjp(function, *primals, parameters=parameters)

        def adding(*cotangents):
            found = list(pullback(*cotangents))
            kept = self.__dict__.setdefault("grads", {})
            for n, parameter in enumerate(parameters):
                before = kept.get(id(parameter))
                kept[id(parameter)] = found[len(primals) + n]
                if before is not None and len(parameters) == 2 and before.shape == found[len(primals) + n].shape:
                    found[len(primals) + n] = found[len(primals) + n] + before
            return tuple(found)

        return outputs, adding


@mutant("VJP-parameters-not-asked")
class OrderOfTheModule(LoopbackPlatform):
    """Gradients come in the order in which parameters were made, if there are other inputs none."""

    def vjp(self, function, *primals, parameters=()):
        if primals or len(parameters) != 2:
            return super().vjp(function, *primals, parameters=parameters)
        outputs, pullback = super().vjp(function, parameters=parameters[::-1])
        return outputs, pullback


@mutant("VJP-same-primal-twice")
class TheSameTensorIsOnePrimal(LoopbackPlatform):
    def vjp(self, function, *primals, parameters=()):
        outputs, pullback = super().vjp(function, *primals, parameters=parameters)

        def summed(*cotangents):
            found = list(pullback(*cotangents))
            for n, x in enumerate(primals):
                same = [m for m, y in enumerate(primals) if y is x]
                found[n] = sum((found[m] for m in same[1:]), found[same[0]]) if len(same) > 1 else found[n]
            return tuple(found)

        return outputs, summed
