# SPDX-License-Identifier: Apache-2.0
"""Modules as their own forward may see them: with this rank's parts in place of the DTensors that a style made.

A forward such as ``F.linear(x, self.weight)`` has plain tensors and cannot compute with DTensors. The module itself
must not be changed for the time of a call: another thread may be calling it, and FSDP2 and ``functional_call`` change
it themselves. So the forward is called on a stand-in, which shares everything with the module but its shards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from hyperep_torch.local_parts import local_part, local_parts

__all__ = [
    "OpensItself",
    "call_opened",
    "divide_gradients",
    "divides_gradients",
    "mark_shard",
    "opens_all",
    "own_parts",
]

_SHARDS = "_hyperep_shards"
"""Attribute of a module: the names of its own parameters and buffers that hyperep has sharded."""

_DIVISOR = "_hyperep_gradient_divisor"
"""Attribute of a module: what the gradients of its own DTensors are divided by."""

_OWN = ("_parameters", "_buffers", "_modules")
"""What a stand-in does not share with its module."""


class OpensItself:
    """Mixed into modules whose forward takes their parts by :func:`own_parts`, and needs no stand-in."""


def mark_shard(module: nn.Module, name: str) -> None:
    """Note that the parameter or buffer *name* of *module* was sharded here, and not by a tool that wants DTensors."""
    module.__dict__[_SHARDS] = (*module.__dict__.get(_SHARDS, ()), name)


def divide_gradients(module: nn.Module, divisor: int) -> None:
    """From now on divide the gradients of the DTensors in *module* by *divisor*.

    It is done where they are opened, and not by hooks, because ``module.to`` makes new parameters of DTensors.
    """
    for part in module.modules():
        part.__dict__[_DIVISOR] = divisor


def divides_gradients(module: nn.Module) -> bool:
    """Whether :func:`divide_gradients` was called on anything in *module*."""
    return any(_DIVISOR in part.__dict__ for part in module.modules())


def opens_all(module: nn.Module) -> bool:
    """Whether every parameter in *module* is opened here, so that :func:`divide_gradients` reaches it."""
    return all(
        isinstance(part, OpensItself) or set(part._parameters) <= set(part.__dict__.get(_SHARDS, ()))
        for part in module.modules()
    )


def own_parts(module: nn.Module) -> dict[str, torch.Tensor]:
    """This rank's parts of the DTensors among the module's own parameters, through which gradients flow.

    Raises:
        ValueError: one is replicated over ranks, and its gradient would be that of this rank's tokens alone.
    """
    own = module._parameters.items()
    given = _given_to(module)
    distributed = {name: p for name, p in own if isinstance(p, DTensor) and name not in given}
    if torch.is_grad_enabled():
        for name, parameter in distributed.items():
            if parameter.requires_grad and any(map(_is_replicate, parameter.placements)):
                _require_known_replicas(module, name, parameter, distributed)
    parts = {**dict(zip(distributed, local_parts(tuple(distributed.values())), strict=True)), **given}
    if (divisor := module.__dict__.get(_DIVISOR)) is not None:
        parts = {name: _Divided.apply(part, divisor) if part.requires_grad else part for name, part in parts.items()}
    return parts


def call_with_given(
    module: nn.Module,
    parameters: Mapping[str, torch.Tensor],
    function: Callable[..., Any],
    *inputs: Any,
    **kwargs: Any,
) -> Any:
    """Call *function*, which calls *module*, with *parameters* (by path) in place of this rank's parts.

    The module is not changed: other threads may be calling it. What they are is looked up where parts are opened.
    """
    given: dict[int, dict[str, torch.Tensor]] = {}
    for path, value in parameters.items():
        owner, _, name = path.rpartition(".")
        given.setdefault(id(module.get_submodule(owner)), {})[name] = value
    with _giving(given):
        return function(*inputs, **kwargs)


_given: ContextVar[Mapping[int, Mapping[str, torch.Tensor]]] = ContextVar("given parameters by module", default={})  # noqa: B039 (never changed)

_any_given = False
"""Whether any thread is in :func:`call_with_given`. It guards compiled graphs, as a ContextVar does not."""

_calls = 0
_calls_lock = threading.Lock()


@contextmanager
def _giving(given: Mapping[int, Mapping[str, torch.Tensor]]) -> Iterator[None]:
    _count(1)
    outer = _given.get()
    token = _given.set({**outer, **{key: {**outer.get(key, {}), **values} for key, values in given.items()}})
    try:
        yield
    finally:
        _given.reset(token)
        _count(-1)


def _count(change: int) -> None:
    global _any_given, _calls
    with _calls_lock:
        _calls += change
        _any_given = _calls > 0


def _given_to(module: nn.Module) -> Mapping[str, torch.Tensor]:
    """A graph that was compiled where nothing is given does not serve where something is; there the compiler breaks."""
    return _given.get().get(id(module), {}) if _any_given else {}


def call_opened(module: nn.Module, forward: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Any:
    """Call ``forward(stand_in, *inputs, **kwargs)``; what it sets on the stand-in is set on *module* afterwards."""
    stand_in = _stand_in(module)
    output = forward(stand_in, *inputs, **kwargs)
    if stand_in is not module:
        _write_back(stand_in, module)
    return output


def _stand_in(module: nn.Module) -> nn.Module:
    """*module* itself if no style has sharded anything in it."""
    if isinstance(module, OpensItself):
        return module
    children = {
        name: stand_in
        for name, child in module._modules.items()
        # A child under FSDP2 gathers its parameters when it is called, and so is opened then.
        if child is not None and not isinstance(child, FSDPModule) and (stand_in := _stand_in(child)) is not child
    }
    parts, buffers = {}, {}
    given = _given_to(module)
    if _SHARDS in module.__dict__ or given:
        shards = module.__dict__.get(_SHARDS, ())
        parts = {name: part for name, part in own_parts(module).items() if name in shards or name in given}
        buffers = {name: local_part(module._buffers[name]) for name in shards if name in module._buffers}
    if not parts and not buffers and not children:
        return module
    stand_in = object.__new__(type(module))
    stand_in.__dict__.update(module.__dict__)
    stand_in.__dict__["_parameters"] = {**module._parameters, **parts}
    stand_in.__dict__["_buffers"] = {**module._buffers, **buffers}
    stand_in.__dict__["_modules"] = {**module._modules, **children}
    return stand_in


def _write_back(stand_in: nn.Module, module: nn.Module) -> None:
    for name, value in stand_in.__dict__.items():
        if name not in _OWN and module.__dict__.get(name, _OWN) is not value:
            module.__dict__[name] = value
    for name, buffer in stand_in._buffers.items():
        held = module._buffers.get(name)
        if not isinstance(held, DTensor):
            module._buffers[name] = buffer
        elif buffer is not None and buffer.data_ptr() != held.to_local().data_ptr():
            module._buffers[name] = DTensor.from_local(buffer, held.device_mesh, held.placements, run_check=False)
    for name, child in stand_in._modules.items():
        original = module._modules.get(name)
        if original is not None and child is not None and child is not original:
            _write_back(child, original)


class _Divided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, divisor: int) -> torch.Tensor:
        ctx.divisor = divisor
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient / ctx.divisor, None


def _require_known_replicas(module: nn.Module, name: str, parameter: DTensor, siblings: dict[str, DTensor]) -> None:
    """A replica beside shards over the same ranks is a style's, such as the bias of a row-parallel linear module."""
    mesh = parameter.device_mesh
    for dimension, placement in enumerate(parameter.placements):
        beside = (s.placements[dimension] for s in siblings.values() if s.device_mesh == mesh)
        if mesh.size(dimension) > 1 and _is_replicate(placement) and all(map(_is_replicate, beside)):
            over = dimension if mesh.mesh_dim_names is None else repr(mesh.mesh_dim_names[dimension])
            raise ValueError(
                f"parameter {name!r} of {type(module).__name__} is a DTensor replicated over the mesh dimension "
                f"{over}; its gradient would be the part of this rank's tokens, and still be called replicated. Leave "
                "it a plain parameter and let hyperep_torch.fully_shard or DDP sum its gradient"
            )


def _is_replicate(placement: Any) -> bool:
    return isinstance(placement, Replicate)
