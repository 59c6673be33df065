# SPDX-License-Identifier: Apache-2.0
"""Wrappers around the forward of any ``torch.nn.Module``, kept by the module itself."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hyperep_torch.linear import linear_forward
from hyperep_torch.opened import call_opened

__all__ = ["WrappedForward", "wrap_forward"]


@dataclass(frozen=True)
class _Wrapper:
    """A wrapper of one module, without the module: a reference would keep it alive until cycles are collected."""

    function: Callable[..., Any]
    takes_module: bool
    """Whether *function* is called with the module first."""

    @classmethod
    def of(cls, module: nn.Module, wrapper: Callable[..., Any]) -> _Wrapper:
        """What a style gives: a function, or one with the module as its first argument."""
        if isinstance(wrapper, functools.partial) and wrapper.args and wrapper.args[0] is module:
            return cls(functools.partial(wrapper.func, *wrapper.args[1:], **wrapper.keywords), True)
        return cls(wrapper, False)

    def around(self, module: nn.Module, inner: Callable[..., Any]) -> Callable[..., Any]:
        """*inner*, wrapped."""
        return functools.partial(self.function, *((module, inner) if self.takes_module else (inner,)))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Wrapper:
        return replace(self, function=copy.deepcopy(self.function, memo))

    def __reduce__(self) -> Any:
        raise TypeError(
            "a module that a style was applied to cannot be pickled, because its exchanges are this process's; save "
            "its state dict (torch.distributed.checkpoint writes and reads it at any number of ranks), and apply the "
            "style after loading"
        )


class WrappedForward:
    """Mixed in before a module's own class; calls that class's forward through the instance's wrappers.

    The wrappers belong to the instance and get the rest of the chain as an argument, bound to the module that is
    called. So a deep copy runs on its own weights, and a class that FSDP2 puts on top finds a forward like any other.
    The module's own forward sees local parts where a style has sharded its parameters.
    """

    _forward_wrappers: tuple[_Wrapper, ...]
    _own_forward: Callable[..., Any] | None = None
    """What stands in for the forward of the module's own class, if anything does."""

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Call the wrappers around the module's own forward, the last one outermost."""
        own = self._own_forward or super(WrappedForward, type(self)).forward
        inner: Callable[..., Any] = functools.partial(call_opened, self, own)
        for wrapper in self._forward_wrappers:
            inner = wrapper.around(self, inner)
        return inner(*inputs, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Made again by its own class, since that of the wrapped ones cannot be found by name; for deep copies too."""
        wrapper, *bases = type(self).__bases__
        if wrapper is not WrappedForward:  # a class that somebody has put on top
            return super().__reduce_ex__(protocol)
        _, (_, *arguments), *rest = super().__reduce_ex__(max(protocol, 2))
        return _new, (*bases, *arguments), *rest


def wrap_forward(module: nn.Module, wrapper: Callable[..., Any]) -> None:
    """From now on calling *module* calls ``wrapper(inner, *inputs, **kwargs)``."""
    if not isinstance(module, WrappedForward):
        module._forward_wrappers = ()
        module.__class__ = _wrapped_class(type(module))
    own = module.__dict__.pop("forward", None)
    if own is not None:
        # Somebody has set a forward on the instance, which would hide the class's; it becomes the innermost part.
        module._forward_wrappers = (*module._forward_wrappers, _Wrapper(_instead(own), False))
    module._forward_wrappers = (*module._forward_wrappers, _Wrapper.of(module, wrapper))


def _instead(own: Callable[..., Any]) -> Callable[..., Any]:
    return lambda inner, *inputs, **kwargs: own(*inputs, **kwargs)


def _new(cls: type[nn.Module], *arguments: Any) -> nn.Module:
    wrapped = _wrapped_class(cls)
    return wrapped.__new__(wrapped, *arguments)


@functools.cache
def _wrapped_class(cls: type[nn.Module]) -> type[nn.Module]:
    names: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    if cls.forward is nn.Linear.forward:
        # A row-parallel style wants to sum before the bias is added, which this forward cannot.
        names["_own_forward"] = staticmethod(linear_forward)
    return type(cls.__name__, (WrappedForward, cls), names)
