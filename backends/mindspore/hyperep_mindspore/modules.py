# SPDX-License-Identifier: Apache-2.0
"""Native cells around a neutral forward, wrappers around the construct of any cell, and sharded parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from mindspore import Parameter, Tensor, nn

from hyperep.sharding import Sharding
from hyperep_mindspore.transfer import contiguous

__all__ = ["NeutralCell", "ShardedParameter", "WrappedConstruct", "shard_parameter", "sharding_of", "wrap_construct"]


class NeutralCell(nn.Cell):
    """A cell whose computation is a neutral ``forward(m, *inputs, **kwargs)``; see the protocol's ``make_module``.

    The cell itself is ``m``: a parameter that is sharded holds its local part and nothing else.
    """

    def __init__(
        self,
        name: str,
        parameters: Mapping[str, Tensor],
        forward: Callable[..., Any],
        children: Mapping[str, nn.Cell],
        buffers: Mapping[str, Tensor],
        description: str,
    ) -> None:
        super().__init__()
        self._neutral_name = name
        self._neutral_forward = forward
        self._neutral_description = description
        # Copied, because two cells made from the same tensors must not train each other.
        for key, value in parameters.items():
            self.insert_param_to_cell(key, Parameter(value.copy(), name=key))
        for key, value in buffers.items():
            self.insert_param_to_cell(key, Parameter(value.copy(), name=key, requires_grad=False))
        for key, child in children.items():
            # An attribute, and not insert_child_to_cell, puts the name of the child before those of its parameters.
            setattr(self, key, child)

    def construct(self, *inputs: Any, **kwargs: Any) -> Any:
        """Call the neutral forward on the tensors as they are at this call."""
        for parameter in self._params.values():
            _hand_out_contiguous_gradients(parameter)
        return self._neutral_forward(self, *inputs, **kwargs)

    def extend_repr(self) -> str:
        """What the cell prints between its brackets."""
        return self._neutral_description

    def _get_name(self) -> str:
        return self._neutral_name


def _hand_out_contiguous_gradients(parameter: Parameter) -> None:
    """Have every gradient of *parameter* made contiguous, whoever differentiates.

    A gradient may be a view: a gate that is multiplied by its transpose gets the transpose of one. MindSpore's in-place
    collectives on the CPU change nothing in a view, and say nothing; and an all-reduce of the gradients is what users
    write. A copy of a cell has parameters without hooks, so this is done at each call, once for each parameter.
    """
    if parameter.requires_grad and not getattr(parameter, "hyperep_hooked", False):
        parameter.register_hook(contiguous)
        parameter.hyperep_hooked = True


class ShardedParameter:
    """Mixed in before a parameter's own class: this rank's part, and how the whole is laid out.

    The optimizers of MindSpore see a parameter of the local shape. The layout goes along where the cell is copied.
    """

    hyperep_sharding: Sharding

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = super().__deepcopy__(memo)  # type: ignore[misc]
        return _with_layout(copied, self.hyperep_sharding)


def sharding_of(parameter: Parameter) -> Sharding | None:
    """How a parameter is laid out; ``None`` if it never was distributed."""
    return parameter.hyperep_sharding if isinstance(parameter, ShardedParameter) else None


def shard_parameter(cell: nn.Cell, name: str, local: Tensor, sharding: Sharding) -> None:
    """Replace the direct parameter *name* by its shard, under the same name.

    Raises:
        ValueError: the cell has no such parameter of its own.
    """
    direct = {key: p for key, p in cell.parameters_and_names(expand=False) if p.requires_grad}
    if name not in direct:
        raise ValueError(f"{type(cell).__name__} has no parameter {name!r} of its own; it has {sorted(direct)}")
    # A copy: a slice would keep the memory of the whole parameter.
    shard = Parameter(local.contiguous().copy(), name=direct[name].name)
    setattr(cell, name, _with_layout(shard, sharding))


def _with_layout(parameter: Parameter, sharding: Sharding) -> Parameter:
    parameter.__class__ = _sharded_class(type(parameter))
    parameter.hyperep_sharding = sharding
    return parameter


@functools.cache
def _sharded_class(cls: type) -> type:
    return cls if issubclass(cls, ShardedParameter) else type("ShardedParameter", (ShardedParameter, cls), {})


class WrappedConstruct:
    """Mixed in before a cell's own class; calls that class's construct through the instance's wrappers.

    The wrappers belong to the instance and get the rest of the chain as an argument, bound to the cell that is called.
    So a deep copy runs on its own weights.
    """

    _construct_wrappers: tuple[Callable[..., Any], ...]

    def construct(self, *inputs: Any, **kwargs: Any) -> Any:
        """Call the wrappers around the cell's own construct, the last one outermost."""
        inner = super().construct  # type: ignore[misc]
        for wrapper in self._construct_wrappers:
            inner = functools.partial(wrapper, inner)
        return inner(*inputs, **kwargs)


def wrap_construct(cell: nn.Cell, wrapper: Callable[..., Any]) -> None:
    """From now on calling *cell* calls ``wrapper(inner, *inputs, **kwargs)``."""
    wrappers = cell._construct_wrappers if isinstance(cell, WrappedConstruct) else ()
    if not isinstance(cell, WrappedConstruct):
        cell.__class__ = _wrapped_class(type(cell))
    own = cell.__dict__.pop("construct", None)
    if own is not None:
        # Somebody has set a construct on the instance, which would hide the class's; it becomes the innermost part.
        wrappers = (*wrappers, lambda inner, *inputs, **kwargs: own(*inputs, **kwargs))
    cell._construct_wrappers = (*wrappers, wrapper)


@functools.cache
def _wrapped_class(cls: type) -> type:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (WrappedConstruct, cls), names)
