# SPDX-License-Identifier: Apache-2.0
"""A list of experts as one module, whose tensors have the expert in dim 0: what styles and grouped products want.

The parameters of ``StackedExperts`` are those of one expert, by the same names, each ``[E, ...]``; as
``torch.func.stack_module_state`` has them. Checkpoints of the list go in and out under the list's own names:
``load_state_dict`` takes either form, and ``hyperep_torch.full_state_dict`` writes the list's.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from hyperep.exchange.routed import routed_from_rows
from hyperep_torch.ambient import platform_on, prepare_platform_on

__all__ = ["StackedExperts", "laid_out_as", "stack_experts"]

_TENSORS = ("_parameters", "_buffers", "_modules")
_PLAIN = (bool, int, float, str, tuple, type(None), torch.dtype)
"""Types of attributes that experts must have in common."""


def stack_experts(experts: Iterable[nn.Module]) -> StackedExperts:
    """One module of a list of experts, with copies of their parameters and buffers, ``[E, ...]``.

    Put it in the place of an ``nn.ModuleList`` and give it a style. It is called with tokens or with rows, see
    ``hyperep.styles.calls``, and calls each expert with its rows ``[N, D]``.

    Args:
        experts: modules of one class and form, such as an ``nn.ModuleList``, on ``meta`` if need be. The first one is
            what all are computed by: its forward, its hooks.

    Raises:
        ValueError: there are none; they differ in class, in the names, shapes or dtypes of their tensors, in which of
            these want gradients, or in an attribute; a tensor is shared or distributed. Nothing has been changed.

    Example:
        >>> import torch, hyperep_torch as hep
        >>> layer = torch.nn.Module()
        >>> layer.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(8))
        >>> names = layer.state_dict().keys()
        >>> layer.experts = hep.stack_experts(layer.experts)
        >>> {name: tuple(p.shape) for name, p in layer.named_parameters()}
        {'experts.weight': (8, 4, 4), 'experts.bias': (8, 4)}
        >>> hep.full_state_dict(layer).keys() == names
        True
    """
    listed = list(experts)
    if not listed:
        raise ValueError("stack_experts got no experts")
    _require_one_form(listed)
    return StackedExperts(listed)


class _Part(nn.Module):
    """Tensors of a module of all experts; what is computed with them the one expert knows that stands for all."""

    def __init__(self, alike: list[nn.Module]) -> None:
        super().__init__()
        first = alike[0]
        for name, parameter in first._parameters.items():
            if parameter is not None:
                stack = torch.stack([module._parameters[name].detach() for module in alike])
                self.register_parameter(name, nn.Parameter(stack, parameter.requires_grad))
        for name, buffer in first._buffers.items():
            if buffer is not None:
                stack = torch.stack([module._buffers[name].detach() for module in alike])
                self.register_buffer(name, stack, name not in first._non_persistent_buffers_set)
        for name, child in first._modules.items():
            if child is not None and any(True for _ in _tensors(child)):
                self.add_module(name, _Part([module._modules[name] for module in alike]))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(t.shape)}" for name, t in (*self._parameters.items(), *self._buffers.items()))


class StackedExperts(_Part):
    """What :func:`stack_experts` makes.

    Its forward is a loop over this rank's experts, whatever their class; the sizes of their runs are read on the host.
    Where they are SwiGLU networks :class:`hyperep_torch.GroupedExperts` is faster, and
    :func:`hyperep_torch.grouped_matmul` is what others may be written with. An attribute that an expert sets in its
    forward is not kept; a buffer that it changes in place is.
    """

    takes = ("tokens", "rows")

    def __init__(self, experts: list[nn.Module]) -> None:
        super().__init__(experts)
        self.num_stacked = len(experts)
        """``E``, also where a rank has fewer."""
        # Not a module of this one, because it has no tensors to train or save.
        self.__dict__["one"] = copy.deepcopy(experts[0]).to("meta")
        prepare_platform_on(next(iter(_tensors(self)))[1].device)

    def forward(self, x: torch.Tensor, *routing: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Tokens ``[T, D]`` with indices and weights ``[T, K]``, or rows ``[N, D]`` with their counts ``[E]``."""
        by_row = functools.partial(self._of_rows, **kwargs)
        if len(routing) == 1:
            return by_row(x, *routing)
        here = next(iter(_tensors(self)))[1].shape[0]
        return routed_from_rows(platform_on(x.device), by_row, here)(x, *routing)

    def _of_rows(self, rows: torch.Tensor, sizes: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        # Unbound at once: the backward of each w[e] by itself would make zeros as large as all of w.
        apart = {name: tensor.unbind(0) for name, tensor in _tensors(self)}
        runs = rows.split(sizes.tolist())  # host sync here, except on the CPU
        # With no rows at all one expert is called, so that all weights have gradients.
        called = [number for number, run in enumerate(runs) if run.shape[0]] or [0]
        done = []
        for number in called:
            one = _standing_for(self.one, {name: each[number] for name, each in apart.items()})
            out = one(runs[number], **kwargs)
            if not isinstance(out, torch.Tensor) or out.shape[:1] != runs[number].shape[:1]:
                got = tuple(out.shape) if isinstance(out, torch.Tensor) else f"a {type(out).__name__}"
                raise TypeError(
                    f"{type(self.one).__name__} returned {got} for rows {tuple(runs[number].shape)}; an expert returns "
                    "one tensor with a row for each row"
                )
            done.append(out)
        return torch.cat(done)

    def train(self, mode: bool = True) -> StackedExperts:
        """Set the mode of every expert."""
        self.one.train(mode)
        return super().train(mode)

    def unstacked(self, name: str, whole: torch.Tensor) -> dict[str, torch.Tensor]:
        """The list's entries of its state dict, of the *whole* tensor *name*."""
        return {f"{number}.{name}": part for number, part in enumerate(whole.unbind(0))}

    def drawn_apart(self, path: str) -> Iterator[tuple[str, nn.Module]]:
        """Each expert that this rank has a part of, whole and by itself, with its path in the list.

        One after the other: what it has when the next one is asked for becomes that of the stack.
        """
        parameters, tensors = dict(self.named_parameters()), dict(_tensors(self))
        for number in range(self.num_stacked):
            places = {name: place for name, t in tensors.items() if (place := _place(name, t, number)) is not None}
            if not places:
                continue
            one = {name: _local(tensor).new_empty(tensor.shape[1:]) for name, tensor in tensors.items()}
            one |= {name: nn.Parameter(one[name], parameters[name].requires_grad) for name in parameters}
            yield f"{path}.{number}".lstrip("."), _standing_for(self.one, one)
            for name, (mine, part) in places.items():
                _local(tensors[name])[mine].copy_(one[name][part])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        persistent = self.state_dict(keep_vars=True)
        if not all(prefix + name in state_dict for name in persistent):
            for name, held in persistent.items():
                keys = [f"{prefix}{number}.{name}" for number in range(self.num_stacked)]
                if all(key in state_dict for key in keys):
                    whole = torch.stack([state_dict.pop(key) for key in keys])
                    state_dict[prefix + name] = laid_out_as(held, whole)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _get_name(self) -> str:
        return f"StackedExperts({self.num_stacked} x {type(self.one).__name__})"


def _standing_for(module: nn.Module, tensors: Mapping[str, Any], prefix: str = "") -> nn.Module:
    """*module* with other *tensors*, by path; it shares everything else with it."""
    one = object.__new__(type(module))
    one.__dict__.update(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        held = module.__dict__[kind]
        one.__dict__[kind] = {n: None if t is None else tensors[prefix + n] for n, t in held.items()}
    one.__dict__["_modules"] = {
        name: None if child is None else _standing_for(child, tensors, f"{prefix}{name}.")
        for name, child in module._modules.items()
    }
    return one


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, by path."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _place(name: str, stack: torch.Tensor, number: int) -> tuple[int, tuple[slice, ...]] | None:
    """Where this rank holds its part of an expert, and which part of it that is; ``None`` if it has none."""
    if not isinstance(stack, DTensor):
        return number, ()
    if any(isinstance(placement, _StridedShard) and placement.dim for placement in stack.placements):
        raise ValueError(
            f"StackedExperts: {name!r} lies as {stack.placements}, of several parts, which is not drawn here; draw the "
            "weights before the style is applied"
        )
    shape, offset = compute_local_shape_and_global_offset(stack.shape, stack.device_mesh, stack.placements)
    mine = number - offset[0]
    if not 0 <= mine < shape[0] or 0 in shape:
        return None
    return mine, tuple(slice(start, start + size) for start, size in zip(offset[1:], shape[1:], strict=True))


def laid_out_as(held: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """*whole*, which every rank has, laid out as *held*."""
    if not isinstance(held, DTensor):
        return whole
    # Every rank has read the whole, so nothing needs to be sent.
    whole = whole.to(held.device)
    return distribute_tensor(whole, held.device_mesh, held.placements, src_data_rank=None)


def _require_one_form(experts: list[nn.Module]) -> None:
    first, *others = experts
    seen: dict[int, str] = {}
    for number, expert in enumerate(experts):
        for name, tensor in _tensors(expert):
            if isinstance(tensor, DTensor):
                raise ValueError(f"stack_experts: {number}.{name} is distributed already; stack first, then shard")
            if id(tensor) in seen:
                raise ValueError(
                    f"stack_experts: {number}.{name} is {seen[id(tensor)]} too, and would be two tensors in the stack"
                )
            seen[id(tensor)] = f"{number}.{name}"
    wanted = _form(first)
    for number, other in enumerate(others, start=1):
        found = _form(other)
        for what in sorted(wanted.keys() | found.keys()):
            if wanted.get(what) != found.get(what):
                raise ValueError(
                    f"stack_experts: experts 0 and {number} differ in {what}: {wanted.get(what)} and "
                    f"{found.get(what)}; all are computed by the forward of expert 0, so they must be alike but for "
                    "the values of tensors"
                )


def _form(expert: nn.Module) -> dict[str, Any]:
    """What experts must have in common."""
    form: dict[str, Any] = {}
    for path, module in expert.named_modules():
        where = f" of {path}" if path else ""
        form["the class" + where] = type(module).__qualname__
        for name, value in module.__dict__.items():
            if name not in _TENSORS and isinstance(value, _PLAIN):
                form[f"the attribute {name!r}{where}"] = value
    for name, tensor in _tensors(expert):
        gradient = ", with a gradient" if tensor.requires_grad else ""
        form[f"the tensor {name!r}"] = f"{tensor.dtype} of shape {tuple(tensor.shape)}{gradient}"
    return form
