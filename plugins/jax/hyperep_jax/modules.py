# SPDX-License-Identifier: Apache-2.0
"""Modules, which JAX does not have: named parameters and children around a forward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import jax

from hyperep.sharding import Sharding
from hyperep_jax.autodiff import read

__all__ = ["Module", "Parameter"]


class Parameter:
    """A cell that holds this rank's part of a parameter or buffer; arrays of JAX cannot be written to."""

    def __init__(self, value: jax.Array, sharding: Sharding | None = None) -> None:
        self.value = value
        self.sharding = sharding
        self.bound: Any = value
        """What modules read: the value, or its stand-in while a function is differentiated."""
        self._shard: Parameter | None = None

    def sharded(self, local: jax.Array, sharding: Sharding) -> Parameter:
        """What takes the place of this one, with the attributes that somebody has set; the same for all who hold it."""
        if self._shard is None:
            self._shard = Parameter(local, sharding)
            self._shard.__dict__.update({k: v for k, v in vars(self).items() if k not in vars(self._shard)})
        elif self._shard.sharding != sharding:
            raise ValueError(
                f"a parameter is shared with another module, where it is laid out as {self._shard.sharding}, and not "
                f"as {sharding}; lay it out alike, or untie the two before"
            )
        return self._shard

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole."""
        return self.value.shape if self.sharding is None else self.sharding.global_shape(self.value.shape)

    @property
    def dtype(self) -> Any:
        """Its dtype."""
        return self.value.dtype

    def set(self, value: jax.Array) -> None:
        """Put another value in."""
        self.value = self.bound = value


class Module:
    """A callable with parameters, buffers and children."""

    def __init__(
        self,
        name: str,
        parameters: Mapping[str, jax.Array],
        forward: Callable[..., Any],
        children: Mapping[str, Module],
        buffers: Mapping[str, jax.Array],
        description: str,
    ) -> None:
        self.name, self.description = name, description
        self.parameters = {key: Parameter(x) for key, x in parameters.items()}
        self.buffers = {key: Parameter(x) for key, x in buffers.items()}
        self.children = dict(children)
        self.wrappers: list[Callable[..., Any]] = []
        self._forward = forward

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the forward inside its wrappers, the last one outermost."""
        call: Callable[..., Any] = self._run
        for wrapper in self.wrappers:
            call = functools.partial(wrapper, call)
        return call(*inputs, **kwargs)

    def _run(self, *inputs: Any, **kwargs: Any) -> Any:
        tensors = {key: read(p.bound) for key, p in {**self.parameters, **self.buffers}.items()}
        return self._forward(SimpleNamespace(**tensors, **self.children), *inputs, **kwargs)

    def walk(self, path: str = "") -> Iterator[tuple[str, Module]]:
        """This module and those below it, with dotted paths."""
        yield path, self
        for key, child in self.children.items():
            yield from child.walk(f"{path}.{key}" if path else key)

    def __repr__(self) -> str:
        children = "".join(f"\n  ({key}): {child!r}".replace("\n", "\n  ") for key, child in self.children.items())
        return f"{self.name}({self.description}{children})"
