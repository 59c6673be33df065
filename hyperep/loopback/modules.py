# SPDX-License-Identifier: Apache-2.0
"""Modules and parameters of the loopback platform: as little as a module can be."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from hyperep.sharding import Sharding

__all__ = ["LoopbackModule", "LoopbackParameter"]


class LoopbackParameter:
    """This rank's part of a parameter or buffer, and how it is laid out."""

    def __init__(self, value: np.ndarray, sharding: Sharding | None = None) -> None:
        self.value = np.array(value)
        self.sharding = sharding
        self.bound: Any = self.value
        """What modules read: the value, or while a function is being differentiated its traced stand-in."""
        self._shard: LoopbackParameter | None = None

    def sharded(self, local: np.ndarray, sharding: Sharding) -> LoopbackParameter:
        """What takes the place of this one, with the attributes that somebody has set; the same for all who hold it.

        Raises:
            ValueError: another module has laid it out in another way.
        """
        if self._shard is None:
            self._shard = LoopbackParameter(local, sharding)
            self._shard.__dict__.update({k: v for k, v in vars(self).items() if k not in vars(self._shard)})
        elif self._shard.sharding != sharding:
            raise ValueError(
                f"a parameter is shared with another module, where it is laid out as {self._shard.sharding}, and not "
                f"as {sharding}; lay it out alike, or untie the two before"
            )
        return self._shard

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return self.value.shape if self.sharding is None else self.sharding.global_shape(self.value.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Its dtype."""
        return self.value.dtype

    def __repr__(self) -> str:
        layout = "" if self.sharding is None else f", {list(self.sharding.placements)}"
        return f"LoopbackParameter({self.shape}, {self.dtype}{layout})"


class LoopbackModule:
    """A callable with named parameters, buffers and children, around a neutral forward."""

    def __init__(
        self,
        name: str,
        parameters: Mapping[str, np.ndarray],
        forward: Callable[..., Any],
        children: Mapping[str, LoopbackModule],
        buffers: Mapping[str, np.ndarray],
        description: str,
    ) -> None:
        self.name = name
        self.description = description
        self.own_parameters = {key: LoopbackParameter(value) for key, value in parameters.items()}
        self.own_buffers = {key: LoopbackParameter(value) for key, value in buffers.items()}
        self.children = dict(children)
        self.wrappers: list[Callable[..., Any]] = []
        self._forward = forward

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the forward inside its wrappers."""
        call: Callable[..., Any] = self._run
        for wrapper in self.wrappers:
            call = functools.partial(wrapper, call)
        return call(*inputs, **kwargs)

    def _run(self, *inputs: Any, **kwargs: Any) -> Any:
        tensors = {key: p.bound for key, p in (self.own_parameters | self.own_buffers).items()}
        return self._forward(SimpleNamespace(**tensors, **self.children), *inputs, **kwargs)

    def walk(self, prefix: str = "") -> Iterator[tuple[str, LoopbackModule]]:
        """This module and all below it, with their dotted paths."""
        yield prefix, self
        for key, child in self.children.items():
            yield from child.walk(f"{prefix}.{key}" if prefix else key)

    def __repr__(self) -> str:
        lines = [
            f"  ({key}): {line}" for key, child in self.children.items() for line in [repr(child).replace("\n", "\n  ")]
        ]
        return "\n".join([f"{self.name}({self.description}", *lines]) + ("\n)" if lines else ")")
