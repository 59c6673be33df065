# SPDX-License-Identifier: Apache-2.0
"""Native cells around a neutral forward, wrappers around the construct of any cell, and sharded parameters."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from hyperep.sharding import Sharding
from hyperep_mindspore.private_names import as_written, keep_source
from hyperep_mindspore.refusals import refuse_recorders, refusing_graphs
from hyperep_mindspore.transfer import contiguous

__all__ = [
    "NeutralCell",
    "ShardedParameter",
    "WrappedConstruct",
    "given",
    "shard_parameter",
    "sharding_of",
    "wrap_construct",
]

_SHARD = "hyperep_shard"
"""Attribute of a parameter that was replaced: its shard, for other cells that hold the same parameter."""


@keep_source
class NeutralCell(nn.Cell):
    """A cell whose computation is a neutral ``forward(m, *inputs, **kwargs)``; see the protocol's ``make_module``.

    The cell itself is ``m``: a parameter that is sharded holds its local part and nothing else. Its buffers are state
    that adds up small steps: ``to`` and ``to_float`` leave them as they are.
    """

    _neutral_dtype: Any = None
    """What ``to_float`` asked for."""

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
        self._neutral_parameters = tuple(parameters)
        self._neutral_buffers = tuple(buffers)
        # Copied, because two cells made from the same tensors must not train each other.
        for key, value in parameters.items():
            self.insert_param_to_cell(key, Parameter(value.copy(), name=key))
        for key, value in buffers.items():
            self.insert_param_to_cell(key, Parameter(value.copy(), name=key, requires_grad=False))
        for key, child in children.items():
            # An attribute, and not insert_child_to_cell, puts the name of the child before those of its parameters.
            setattr(self, key, child)

    @refusing_graphs
    def construct(self, *inputs: Any, **kwargs: Any) -> Any:
        """Call the neutral forward on the tensors as they are at this call."""
        refuse_recorders()
        for parameter in self._params.values():
            _hand_out_contiguous_gradients(parameter)
        dtype = self._neutral_dtype
        if dtype is None:
            return self._neutral_forward(self, *inputs, **kwargs)
        inputs = tuple(_in_dtype(value, dtype) for value in inputs)
        kwargs = {name: _in_dtype(value, dtype) for name, value in kwargs.items()}
        return self._neutral_forward(_Cast(self, dtype), *inputs, **kwargs)

    def add_flags(self, **flags: Any) -> NeutralCell:
        """Set flags; those of ``to_float`` cast inputs and weights, and not every operand of every operator inside.

        A neutral forward says itself what it computes in float32: the router, and the sums over a token's rows.
        """
        super().add_flags(**flags)
        asked = [dtype for flag, dtype in _TO_FLOAT.items() if flags.get(flag)]
        if asked:
            (self._neutral_dtype,) = asked
            self.mixed_precision_type = as_written
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NeutralCell:
        """What ``to`` and ``to_empty`` go through; children first, each by this method of its own."""
        own = {id(self._params[name]) for name in self._neutral_buffers}

        def keeping(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if id(tensor) not in own or converted.dtype == tensor.dtype:
                return converted
            # From the old values: those of the new dtype may have lost digits.
            return tensor.to(device=converted.device)

        if recurse:
            for child in self.cells():
                child._apply(fn)
        return super()._apply(keeping, recurse=False)

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


_TO_FLOAT = {"fp16": ms.float16, "fp32": ms.float32, "bf16": ms.bfloat16}
"""The flags that ``to_float`` sets."""


class _Cast:
    """What a neutral forward sees of a cell under ``to_float``: weights in that dtype, the rest as it is."""

    def __init__(self, cell: NeutralCell, dtype: Any) -> None:
        self._cell = cell
        self._dtype = dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._cell, name)
        return _in_dtype(value, self._dtype) if name in self._cell._neutral_parameters else value


def _in_dtype(value: Any, dtype: Any) -> Any:
    """A tensor of floats in *dtype*; anything else as it is."""
    is_float = isinstance(value, Tensor) and value.dtype in (ms.float16, ms.bfloat16, ms.float32, ms.float64)
    return ops.cast(value, dtype) if is_float and value.dtype != dtype else value


@contextlib.contextmanager
def given(cell: nn.Cell, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block, tensors stand in the places of parameters, by path.

    They are attributes of the cell's own, which are found before its parameters; those stay where they are, because
    MindSpore looks through them at each call.
    """
    owners = dict(cell.cells_and_names())
    places = [(owners[path.rpartition(".")[0]].__dict__, path.rpartition(".")[2], path) for path in parameters]
    before = [(held, name, held[name]) for held, name, _ in places if name in held]
    try:
        for held, name, path in places:
            held[name] = parameters[path]
        yield
    finally:
        for held, name, _ in places:
            held.pop(name, None)
        for held, name, value in before:
            held[name] = value


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
    """Replace the direct parameter or buffer *name* by its shard, under the same name.

    Raises:
        ValueError: the cell has no such parameter of its own.
    """
    direct = dict(cell.parameters_and_names(expand=False))
    if name not in direct:
        raise ValueError(f"{type(cell).__name__} has no parameter {name!r} of its own; it has {sorted(direct)}")
    whole = direct[name]
    if sharding_of(whole) == sharding:
        return
    shard = getattr(whole, _SHARD, None)
    if shard is None:
        # A copy: a slice would keep the memory of the whole parameter.
        shard = Parameter(local.contiguous().copy(), name=whole.name, requires_grad=whole.requires_grad)
        for key, value in vars(whole).items():
            if key not in vars(shard) and not key.startswith("hyperep_"):
                setattr(shard, key, value)  # what somebody has set
        shard = _with_layout(shard, sharding)
        setattr(whole, _SHARD, shard)
    elif shard.hyperep_sharding != sharding:
        raise ValueError(
            f"parameter {name!r} of {type(cell).__name__} is shared with another cell, where it is laid out as "
            f"{shard.hyperep_sharding}, and not as {sharding}; lay it out alike, or untie the two before"
        )
    setattr(cell, name, shard)


def _with_layout(parameter: Parameter, sharding: Sharding) -> Parameter:
    parameter.__class__ = _sharded_class(type(parameter))
    parameter.hyperep_sharding = sharding
    return parameter


@functools.cache
def _sharded_class(cls: type) -> type:
    return cls if issubclass(cls, ShardedParameter) else type("ShardedParameter", (ShardedParameter, cls), {})


@keep_source
class WrappedConstruct:
    """Mixed in before a cell's own class; calls that class's construct through the instance's wrappers.

    The wrappers belong to the instance and get the rest of the chain as an argument, bound to the cell that is called.
    So a deep copy runs on its own weights.
    """

    _construct_wrappers: tuple[Callable[..., Any], ...]

    @refusing_graphs
    def construct(self, *inputs: Any, **kwargs: Any) -> Any:
        """Call the wrappers around the cell's own construct, the last one outermost."""
        refuse_recorders()
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
