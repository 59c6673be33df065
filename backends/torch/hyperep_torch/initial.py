# SPDX-License-Identifier: Apache-2.0
"""``init_weights``: a model's initial weights, the same numbers however its parameters are sharded.

Each module is asked for its ``reset_parameters``, PyTorch's own way, and every random fill in it is answered with
numbers by their place (:mod:`hyperep_torch.counted`). A rank draws its shards and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import TorchDispatchMode

from hyperep_torch import counted
from hyperep_torch.stacked import StackedExperts

__all__ = ["init_weights"]

_RESETS = ("reset_parameters", "_reset_parameters")
"""Names under which PyTorch's modules draw their weights; the second one is older."""

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
    """
    _require_resets(model)
    numbers = _NumbersByPlace(seed)
    numbers.know("", model)
    for path, module in reversed(list(model.named_modules())):
        if isinstance(module, StackedExperts):
            # By the paths of the list that was stacked, so that they are the list's numbers.
            for expert_path, expert in module.drawn_apart(path):
                numbers.know(expert_path, expert)
                for inner, part in reversed(list(expert.named_modules())):
                    _draw(part, f"{expert_path}.{inner}".rstrip("."), numbers)
        else:
            _draw(module, path, numbers)


def _draw(module: nn.Module, path: str, numbers: _NumbersByPlace) -> None:
    reset = _reset_of(module)
    if reset is None:
        return
    # What draws a tensor of its own and copies it is the same on all ranks at least.
    with torch.random.fork_rng(devices=()), numbers.of(path):
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
    return next((getattr(module, name) for name in _RESETS if callable(getattr(module, name, None))), None)


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


class _NumbersByPlace(TorchDispatchMode):
    """Answers random fills of a model's parameters and buffers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self._paths: dict[int, str] = {}
        self._drawn: Counter[str] = Counter()
        self._module = ""

    def know(self, path: str, model: nn.Module) -> None:
        """Take the tensors of *model*, which stands at *path*, for those that are filled."""
        self._paths |= {id(tensor): f"{path}.{name}".lstrip(".") for name, tensor in _tensors(model)}

    def of(self, path: str) -> _NumbersByPlace:
        """The same, while the module at *path* draws."""
        self._module = path
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name() if hasattr(func, "name") else ""
        values = _VALUES.get(name)
        if values is None:
            if name in _UNKNOWN and id(args[0]) in self._paths:
                raise NotImplementedError(
                    f"init_weights: {self._paths[id(args[0])]} is filled by {name}; only uniform and normal numbers "
                    "(and what torch.nn.init makes of them elementwise) are the same at every degree"
                )
            return func(*args, **(kwargs or {}))
        target = args[0]
        # Temporaries, as of truncated normal numbers, which are drawn until they fit, go by the order of draws.
        path = self._paths.get(id(target), f"{self._module}/temporary")
        key = counted.key_of(self.seed, path, self._drawn[path])
        self._drawn[path] += 1
        local, whole, offset = _part(target)
        counted.fill(local, whole, offset, lambda places: values(key, places, *args[1:]))
        return target


def _part(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]:
    """This rank's part of a tensor, the shape of the whole, and where the part begins in it."""
    if not isinstance(tensor, DTensor):
        return tensor, tuple(tensor.shape), (0,) * tensor.ndim
    if any(isinstance(placement, Partial) for placement in tensor.placements):
        raise ValueError(f"init_weights: a parameter has the layout {tensor.placements}, and so no values of its own")
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = tensor._local_tensor
    assert tuple(shape) == tuple(local.shape), (shape, local.shape)
    return local, tuple(tensor.shape), tuple(offset)


def _uniform(key: int, places: torch.Tensor, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    return counted.uniform(key, places) * (high - low) + low


def _normal(key: int, places: torch.Tensor, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    return counted.normal(key, places) * std + mean


_VALUES = {"aten::uniform_": _uniform, "aten::normal_": _normal}
_UNKNOWN = frozenset(
    f"aten::{name}"
    for name in (
        "bernoulli_.float",
        "bernoulli_.Tensor",
        "cauchy_",
        "exponential_",
        "geometric_",
        "log_normal_",
        "random_",
    )
)
