# SPDX-License-Identifier: Apache-2.0
"""Faults of modules, parameters and shards."""

import copy

import numpy as np

from hyperep.loopback.modules import LoopbackParameter
from hyperep.loopback.platform import LoopbackPlatform, _value
from mutants.registry import mutant


class _Slots:
    __slots__ = ("parameter",)


@mutant("MOD-paths", says="another object")
class HandlesMadeAnew(LoopbackPlatform):
    def parameters(self, module):
        return {path: copy.copy(parameter) for path, parameter in super().parameters(module).items()}


@mutant("MOD-paths", says="weak references")
class HandlesWithoutWeakReferences(LoopbackPlatform):
    def buffers(self, module):
        found, made = super().buffers(module), vars(self).setdefault("made", {})
        for parameter in found.values():
            made.setdefault(parameter, _Slots()).parameter = parameter
        return {path: made[parameter] for path, parameter in found.items()}

    def local(self, parameter):
        return super().local(parameter.parameter if isinstance(parameter, _Slots) else parameter)


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


@mutant("MOE-no-tokens", says="gradient of")
class NothingInNothingOut(LoopbackPlatform):
    """A rank without tokens takes all gradients of a layer for zero, also those that others' tokens made."""

    def vjp(self, function, *primals, parameters=()):
        outputs, pullback = super().vjp(function, *primals, parameters=parameters)
        if len(parameters) != 4 or len(primals[0]):
            return outputs, pullback
        return outputs, lambda *c: tuple(np.zeros_like(g) for g in pullback(*c))


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


@mutant("MOD-functional-call", says="afterwards")
class GivenParametersStay(LoopbackPlatform):
    """After an error the module has what was given to it."""

    def functional_call(self, module, parameters, function, *inputs, **kwargs):
        handles = self.parameters(module)
        before = {name: handles[name].bound for name in parameters}
        for name, value in parameters.items():
            handles[name].bound = value
        out = function(*inputs, **kwargs)
        for name, value in before.items():
            handles[name].bound = value
        return out


@mutant("MOD-functional-call", says="gradient of what stood")
class GivenParametersDetached(LoopbackPlatform):
    def functional_call(self, module, parameters, function, *inputs, **kwargs):
        plain = {name: _value(value) for name, value in parameters.items()}
        return super().functional_call(module, plain, function, *inputs, **kwargs)


@mutant("MOD-functional-call")
class OnlyTheModuleItselfIsGiven(LoopbackPlatform):
    """Parameters of modules below it are left as they are."""

    def functional_call(self, module, parameters, function, *inputs, **kwargs):
        own = {name: value for name, value in parameters.items() if "." not in name}
        return super().functional_call(module, own, function, *inputs, **kwargs)
