# SPDX-License-Identifier: Apache-2.0
"""``init_weights``: a model's initial weights, the same numbers however its parameters are sharded.

Each module is asked for its ``reset_parameters``, PyTorch's own way, and every random fill in it is answered with
numbers by their place (:mod:`hyperep_torch.counted`). A rank draws its shards and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hyperep_torch import counted
from hyperep_torch.counted import Start
from hyperep_torch.slices import Box, Root, Slice, by_parts, covered, is_by_element, is_even, sliced, starts_of, taken
from hyperep_torch.stacked import StackedExperts

__all__ = ["init_weights"]

_RESETS = ("reset_parameters", "_reset_parameters")
"""Names under which PyTorch's modules draw their weights; the second one is older."""

_WRAPPED = frozenset(("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod"))
"""Names under which PyTorch's wrappers, of checkpointing and compilation, have the module."""

_INSTEAD = (
    "fill it, or slices of it, in place: with torch.nn.init, uniform_, normal_, zero_, fill_, or copy_ of a tensor of "
    "the slice's whole shape"
)

_SHOWN = 5


@torch.no_grad()
def init_weights(model: nn.Module, seed: int = 0) -> None:
    """Draw all weights of *model* in place, by the ``reset_parameters`` of its modules, inner modules first.

    The same seed gives the same weights at every degree of every kind of parallelism, and on every rank the right part
    of them; no rank draws or holds more than its own part.

    Args:
        model: sharded or not; on a device (see ``nn.Module.to_empty``).
        seed: of the weights; each parameter has numbers of its own, by its path.

    Raises:
        ValueError: a parameter is still on ``meta``; or a module has parameters or buffers and no
            ``reset_parameters``, so that nobody knows what they should be. Nothing has been drawn then.
        NotImplementedError: a ``reset_parameters`` does what a rank cannot do for its part alone, such as drawing other
            numbers than uniform and normal ones; or a sharded parameter was not written to, or not to all of it.
    """
    _require_resets(model)
    numbers = _NumbersByPlace(seed)
    numbers.know("", model)
    sharded = _sharded(model)
    for path, module in reversed(list(model.named_modules())):
        if isinstance(module, StackedExperts):
            # By the paths of the list that was stacked, so that they are the list's numbers.
            for expert_path, expert in module.drawn_apart(path):
                numbers.know(expert_path, expert)
                for inner, part in reversed(list(expert.named_modules())):
                    _draw(part, f"{expert_path}.{inner}".rstrip("."), numbers)
                numbers.forget(expert)
        else:
            _draw(module, path, numbers)
    numbers.require_all_written(sharded)


def _draw(module: nn.Module, path: str, numbers: _NumbersByPlace) -> None:
    reset = _reset_of(module)
    if reset is None:
        return
    path = _plain(path)
    # What draws a tensor of its own and copies it is the same on all ranks at least.
    with torch.random.fork_rng(devices=()), numbers.of(path, module):
        torch.manual_seed(counted.key_of(numbers.seed, path))
        reset()


def _require_resets(model: nn.Module) -> None:
    on_meta = [path for path, tensor in _tensors(model) if tensor.is_meta]
    if on_meta:
        raise ValueError(
            f"init_weights: {_listed(on_meta)} are on the meta device; first give the model memory, with "
            "model.to_empty(device=...)"
        )
    silent = [
        f"{path or 'the model itself'} ({type(module).__name__})"
        for path, module in _modules(model)
        if (module._parameters or module._buffers) and _reset_of(module) is None and not _is_list(module)
    ]
    if silent:
        raise ValueError(
            f"init_weights: {_listed(silent)} have parameters or buffers and no reset_parameters(); write that method, "
            "which sets them all, as PyTorch's own modules have it"
        )


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those that know what their weights should be; of experts that are stacked, those of one for all."""
    stacks: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, StackedExperts):
            stacks.append(path)
            yield from ((f"{path}.*.{inner}".strip("."), part) for inner, part in module.one.named_modules())
        elif not any(not stack or path.startswith(stack + ".") for stack in stacks):
            yield path, module


def _is_list(module: nn.Module) -> bool:
    """Lists of parameters are drawn by the modules that hold them."""
    return isinstance(module, nn.ParameterList | nn.ParameterDict)


def _reset_of(module: nn.Module) -> Callable[[], None] | None:
    resets = (getattr(module, name, None) for name in _RESETS)
    # Wrappers give the method of the module that they wrap, which has been asked itself.
    return next((r for r in resets if callable(r) and getattr(r, "__self__", module) is module), None)


def _sharded(model: nn.Module) -> list[tuple[nn.Module, str, DTensor, torch.Size]]:
    """Sharded parameters and buffers, after their modules and names, with their shapes."""
    stacked = {id(t) for part in model.modules() if isinstance(part, StackedExperts) for _, t in _tensors(part)}
    return [
        (module, name, tensor, tensor.shape)
        for module in model.modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if isinstance(tensor, DTensor) and id(tensor) not in stacked
    ]


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


class _NumbersByPlace(TorchDispatchMode):
    """Answers random fills of a model's parameters and buffers, and what is written to slices of sharded ones."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self._paths: dict[int, str] = {}
        self._locals: dict[int, str] = {}
        self._drawn: Counter[str] = Counter()
        self._written: dict[str, dict[tuple[int, ...], set[Box]]] = {}
        self._opened: set[str] = set()
        self._module = ""
        self._class = ""

    def know(self, path: str, model: nn.Module) -> None:
        """Take the tensors of *model*, which stands at *path*, for those that are filled."""
        for name, tensor in _tensors(model):
            self._paths[id(tensor)] = _plain(f"{path}.{name}")
            if isinstance(tensor, DTensor):
                self._locals[_memory(tensor._local_tensor)] = self._paths[id(tensor)]

    def forget(self, model: nn.Module) -> None:
        """What is made afterwards may have the same identity."""
        for _, tensor in _tensors(model):
            del self._paths[id(tensor)]

    def of(self, path: str, module: nn.Module) -> _NumbersByPlace:
        """The same, while *module*, which stands at *path*, draws."""
        self._module, self._class = path, type(module).__name__
        return self

    def require_all_written(self, sharded: list[tuple[nn.Module, str, DTensor, torch.Size]]) -> None:
        """Refuse what nobody has written to, or not to all of it."""
        for module, name, tensor, shape in sharded:
            own, written = self._paths[id(tensor)], self._written.get(self._paths[id(tensor)], {})
            # A buffer may keep what it had, and what is done to local tensors is in the hands of who does it.
            free = name in module._buffers or own in self._opened
            kept = getattr(module, name, None) is tensor
            if not kept or not (free or any(covered(space, boxes) for space, boxes in written.items())):
                raise NotImplementedError(
                    f"init_weights: {own} {tuple(shape)} is sharded, and reset_parameters of "
                    f"{type(module).__name__} has not written to all of it in place; {_INSTEAD}, and assign neither "
                    "another tensor nor its .data"
                )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        name = func.name()
        if name in _LIKE:
            made = self.__torch_dispatch__(torch.ops.aten.empty_like.default, types, args, kwargs)
            return self._filled(_LIKE[name], made)
        written = _written(func, args, kwargs)
        if name in _VALUES:
            self._filled(_VALUES[name], *args)
            self._note(written)
            return args[0]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        sharded = [tensor for tensor in tensors if isinstance(tensor, DTensor | Slice)]
        if torch.Tag.nondeterministic_seeded in func.tags and (
            sharded or any(id(tensor) in self._paths for tensor in written)
        ):
            filled = self._name(sharded[0] if sharded else written[0])
            raise NotImplementedError(
                f"init_weights: {filled} is filled by {name}; only uniform and normal numbers "
                "(and what torch.nn.init makes of them elementwise) are the same at every degree"
            )
        if name in _EYES and sharded:
            local, whole, offset = self._part(kwargs["out"])
            counted.fill(local, whole, offset, lambda places: places // whole[1] == places % whole[1])
            self._note(written)
            return kwargs["out"]
        if not sharded:
            if self._locals:
                self._opened.update(self._locals[m] for t in tensors if (m := _memory(t)) in self._locals)
            return func(*args, **kwargs)
        try:
            made = self._of_sharded(func, args, kwargs, tensors, written)
        except Exception as error:
            raise self._refused(func, sharded[0], error) from error
        if is_by_element(func):
            self._note(written)
        return made

    def _filled(self, values: Callable[..., torch.Tensor], target: torch.Tensor, *numbers: float) -> torch.Tensor:
        if self._locals and not isinstance(target, DTensor | Slice) and _memory(target) in self._locals:
            raise NotImplementedError(
                f"init_weights: {self._class} at {self._module or 'the top'} draws this rank's part of "
                f"{self._locals[_memory(target)]} by itself, and so as every other rank does; {_INSTEAD}"
            )
        # Slices and temporaries, as of truncated normal numbers, which are drawn until they fit, go by the order of
        # draws.
        path = self._paths.get(id(target), f"{self._module}/temporary")
        key = counted.key_of(self.seed, path, self._drawn[path])
        self._drawn[path] += 1
        local, whole, offset = self._part(target)
        counted.fill(local, whole, offset, lambda places: values(key, places, *numbers))
        return target

    def _part(self, tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...], Sequence[Start]]:
        """This rank's part of a tensor, the shape of the whole, and where in it the part begins."""
        if isinstance(tensor, Slice):
            try:
                part, starts = tensor.part()
            except NotImplementedError as error:
                raise self._refused(None, tensor, error) from error
            return part, tuple(tensor.shape), starts
        if isinstance(tensor, DTensor):
            return tensor._local_tensor, tuple(tensor.shape), starts_of(tensor)
        return tensor, tuple(tensor.shape), (0,) * tensor.ndim

    def _of_sharded(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], written: list[Any]) -> Any:
        first = args[0] if args else None
        if torch.Tag.inplace_view in func.tags:
            raise NotImplementedError
        if func.is_view and isinstance(first, Slice):
            return taken(func, first, args, kwargs)
        if func.is_view and isinstance(first, DTensor) and func.name() != "aten::detach":
            slices = taken(func, self._root(first), args, kwargs)
            if all(one.box() is not None for one in tree_leaves(slices)):
                return slices
        plain = any(not isinstance(tensor, DTensor | Slice) for tensor in tensors)
        if any(isinstance(tensor, Slice) for tensor in tensors) or (plain and is_by_element(func)):
            as_slices: dict[int, Slice] = {id(t): sliced(self._root(t)) for t in tensors if isinstance(t, DTensor)}
            args_, kwargs_, written_ = tree_map(lambda v: as_slices.get(id(v), v), (args, kwargs, written))
            made = by_parts(func, args_, kwargs_, written_)
            return written[0] if written else made
        # Where dims are merged or split PyTorch knows what becomes of a layout, but of ranks alike alone.
        if func.is_view and func.name() != "aten::detach" and not is_even(first):
            raise NotImplementedError
        made = func(*args, **kwargs)
        if func.is_view:
            for view in tree_leaves(made):
                if view._local_tensor.untyped_storage()._cdata != first._local_tensor.untyped_storage()._cdata:
                    raise NotImplementedError
                view._hyperep_of = self._path(first)
        return made

    def _root(self, tensor: DTensor) -> Root:
        return Root.of(tensor, self._name(tensor), self._path(tensor))

    def _path(self, tensor: torch.Tensor) -> str | None:
        """That of the parameter whose memory it has."""
        if isinstance(tensor, Slice):
            return tensor.root.path
        return self._paths.get(id(tensor)) or getattr(tensor, "_hyperep_of", None)

    def _name(self, tensor: torch.Tensor) -> str:
        if isinstance(tensor, Slice):
            return tensor.root.name
        return self._path(tensor) or f"a tensor that {self._module or 'the model itself'} draws"

    def _note(self, written: list[Any]) -> None:
        for tensor in written:
            path = self._path(tensor) if isinstance(tensor, DTensor | Slice) else None
            if path is None:
                continue
            whole = isinstance(tensor, DTensor)
            shape = tuple(tensor.shape) if whole else tensor.root.shape
            box = tuple((0, 1, size) for size in shape) if whole else tensor.box()
            if tensor.numel():
                self._written.setdefault(path, {}).setdefault(shape, set()).add(box)

    def _refused(self, func: Any, tensor: torch.Tensor, error: Exception) -> NotImplementedError:
        what = f" by {func.name()}" if func is not None else ""
        why = f" ({str(error).splitlines()[0]})" if " " in str(error) else ""
        return NotImplementedError(
            f"init_weights: {self._name(tensor)} is sharded, and reset_parameters of {self._class} at "
            f"{self._module or 'the top'} uses it, or a slice of it{what}, in a way that this rank's part does not "
            f"tell{why}; {_INSTEAD}"
        )


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The tensors that an operation writes to."""
    declared = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if not declared:
        return []
    given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    return [leaf for a in declared for leaf in tree_leaves(given.get(a.name)) if isinstance(leaf, torch.Tensor)]


def _plain(path: str) -> str:
    """*path* without the names of what wraps modules, whose weights it does not change."""
    return ".".join(name for name in path.split(".") if name and name not in _WRAPPED)


def _uniform(key: int, places: torch.Tensor, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    return counted.uniform(key, places) * (high - low) + low


def _normal(key: int, places: torch.Tensor, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    return counted.normal(key, places) * std + mean


_VALUES = {"aten::uniform_": _uniform, "aten::normal_": _normal}
_EYES = frozenset(("aten::eye.m_out", "aten::eye.out"))
_LIKE = {"aten::rand_like": _uniform, "aten::randn_like": _normal}
