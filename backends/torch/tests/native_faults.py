# SPDX-License-Identifier: Apache-2.0
"""Faults that ``vjp`` does not see, and PyTorch's own backward, optimizers and state dicts do."""

from hyperep_torch.platform import TorchPlatform
from torch import nn

__all__ = ["NATIVE_FAULTS"]


class RecordedForVjpAlone(TorchPlatform):
    """A custom function knows its backward only inside vjp."""

    inside = 0

    def vjp(self, function, *primals, parameters=()):
        RecordedForVjpAlone.inside += 1
        try:
            return super().vjp(function, *primals, parameters=parameters)
        finally:
            RecordedForVjpAlone.inside -= 1

    def custom_vjp(self, forward, backward):
        custom = super().custom_vjp(forward, backward)

        def call(*inputs):
            if self.inside:
                return custom(*inputs)
            return forward(*(x.detach() for x in inputs))[0] + 0 * inputs[0]

        return call


class ParametersAreCopies(TorchPlatform):
    """Handles that an optimizer takes and nobody reads."""

    def parameters(self, module):
        found = super().parameters(module)
        copies = self.__dict__.setdefault("copies", {})
        return {name: copies.setdefault(id(p), (nn.Parameter(p.detach().clone()), p))[0] for name, p in found.items()}

    def assign(self, parameter, value):
        for copied, real in self.__dict__.get("copies", {}).values():
            if copied is parameter:
                super().assign(real, value)
        super().assign(parameter, value)

    def vjp(self, function, *primals, parameters=()):
        real = {id(c): r for c, r in self.__dict__.get("copies", {}).values()}
        return super().vjp(function, *primals, parameters=[real.get(id(p), p) for p in parameters])


class BuffersNotSaved(TorchPlatform):
    def make_module(self, name, parameters, forward, *, children=None, buffers=None, description=""):
        module = super().make_module(
            name, parameters, forward, children=children, buffers=buffers, description=description
        )
        module._non_persistent_buffers_set.update(buffers or {})
        return module


class BuffersCountBackwards(TorchPlatform):
    """A buffer moves whenever a gradient reaches a parameter beside it."""

    def make_module(self, name, parameters, forward, *, children=None, buffers=None, description=""):
        module = super().make_module(
            name, parameters, forward, children=children, buffers=buffers, description=description
        )

        def count(parameter):
            for key in buffers or {}:
                module._buffers[key].data.add_(1)

        for parameter in module._parameters.values():
            parameter.register_post_accumulate_grad_hook(count)
        return module


class WeightsReadWhenAssigned(TorchPlatform):
    """A module computes with the values that were assigned last; an optimizer's steps it does not see."""

    def make_module(self, name, parameters, forward, *, children=None, buffers=None, description=""):
        def reading(m, *inputs, **kwargs):
            for key in parameters:
                p = getattr(m, key)
                held = module._parameters[key].__dict__.setdefault("held", p.detach().clone())
                setattr(m, key, held + p - p.detach())
            return forward(m, *inputs, **kwargs)

        module = super().make_module(
            name, parameters, reading, children=children, buffers=buffers, description=description
        )
        return module

    def assign(self, parameter, value):
        super().assign(parameter, value)
        parameter.held = parameter.detach().clone()


class GradientsLeftBehind(TorchPlatform):
    """A pullback accumulates into the parameters, as backward() would."""

    def vjp(self, function, *primals, parameters=()):
        outputs, pullback = super().vjp(function, *primals, parameters=parameters)

        def accumulating(*cotangents):
            found = pullback(*cotangents)
            for parameter, g in zip(parameters, found[len(primals) :], strict=True):
                if type(parameter) is nn.Parameter and parameter.shape == g.shape:
                    parameter.register_hook(lambda grad, g=g: grad + g)
            return found

        return outputs, accumulating


_ALL = (
    RecordedForVjpAlone,
    GradientsLeftBehind,
    ParametersAreCopies,
    BuffersNotSaved,
    BuffersCountBackwards,
    WeightsReadWhenAssigned,
)
NATIVE_FAULTS = {fault.__name__: fault for fault in _ALL}
