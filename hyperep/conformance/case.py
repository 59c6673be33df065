# SPDX-License-Identifier: Apache-2.0
"""``Case``: what a check gets to work with on one rank."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hyperep.conformance import compare
from hyperep.mesh import DeviceMesh, init_device_mesh
from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.errors import UnsupportedCapability
from hyperep.platform.protocol import Group

__all__ = ["Case"]

_MESHES = "_conformance_meshes"
"""Attribute of a platform object, which lives as long as its world."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One requirement on one rank."""

    platform: Any
    """A :class:`~hyperep.platform.protocol.Platform`; nothing about it is taken for granted, since it is under test."""
    requirement: str
    """Id of the requirement."""
    seed: int
    ranks: int
    """The world size that was asked for."""
    declared: Mapping[str, str]
    """Capability -> support, as the plugin's spec declares them; by value."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Shown with a failure: splits, shapes, routings."""
    measurements: list[tuple[float, str]] = field(default_factory=list)
    """Of a check of speed: ratios, and what they mean."""

    @property
    def rank(self) -> int:
        """This rank."""
        return self.platform.rank

    @property
    def xp(self) -> Any:
        """The platform's array namespace."""
        return self.platform.xp

    # ------------------------------------------------------------------------------------------------- data
    def rng(self, *key: int) -> np.random.Generator:
        """A generator that depends on the seed, the requirement and *key*: the same on every rank."""
        return np.random.default_rng([self.seed, zlib.crc32(self.requirement.encode()), *key])

    def divisible(self, least: int) -> int:
        """The smallest size from *least* on that the number of ranks divides, and so each number that divides this."""
        return -(-least // self.ranks) * self.ranks

    def normal(self, shape: Sequence[int], *key: int) -> np.ndarray:
        """Float32 values of size O(1); give the rank in *key* for data that differ by rank."""
        return self.rng(*key).normal(size=tuple(shape)).astype(np.float32)

    def tensor(self, array: Any, dtype: str | None = None) -> Any:
        """*array* on the device; with *dtype* cast there, which is how dtypes that NumPy lacks come to be."""
        tensor = self.platform.from_host(np.asarray(array))
        return tensor if dtype is None else self.xp.astype(tensor, self.dtype(dtype))

    def dtype(self, name: str) -> Any:
        """The dtype object of that name.

        Raises:
            UnsupportedCapability: the namespace has none; how a platform says that it does not know a dtype.
        """
        if not hasattr(self.xp, name):
            raise UnsupportedCapability(self.platform.name, Capability(name), "xp has no dtype of that name")
        return getattr(self.xp, name)

    def assign(self, module: Any, values: Mapping[str, np.ndarray]) -> None:
        """Give parameters of *module* these values, and keep no handle of them.

        A style looks for those who hold a whole parameter, which takes a while; nobody should by mistake.
        """
        for name, value in values.items():
            self.platform.assign(self.platform.parameters(module)[name], self.tensor(value))

    def host(self, tensor: Any) -> np.ndarray:
        """One tensor on the host."""
        (array,) = self.platform.to_host(tensor)
        return array

    def supports(self, capability: Capability) -> bool:
        """Whether the platform declares it, as FULL or EMULATED."""
        return self.platform.capabilities.get(capability, Support.UNSUPPORTED) is not Support.UNSUPPORTED

    # ---------------------------------------------------------------------------------------------- verdicts
    def note(self, **values: Any) -> None:
        """Have *values* shown if the check fails."""
        self.notes.update(values)

    def measured(self, ratio: float, text: str) -> None:
        """Have *ratio*, which *text* explains, reported as what came of a check of speed."""
        self.measurements.append((ratio, text))

    def equal(self, got: Any, want: Any, what: str) -> None:
        """Demand the same shape, dtype and values."""
        array = got if isinstance(got, np.ndarray) else self.host(got)
        compare.same(array, np.asarray(want), what)

    def close(self, got: Any, want: Any, what: str, tolerance: float = 1e-5) -> None:
        """Demand the same shape and values up to a relative error, measured against the largest value."""
        array = got if isinstance(got, np.ndarray) else self.host(got)
        compare.near(array, np.asarray(want), what, tolerance)

    def is_true(self, condition: bool, message: str) -> None:
        """Demand *condition*; not an ``assert``, which ``python -O`` would drop."""
        if not condition:
            raise AssertionError(message)

    def raises(self, kind: type[Exception], function: Callable[[], Any], *words: str) -> Exception:
        """Demand that *function* raises *kind* with all *words* in its message; return the error."""
        try:
            result = function()
        except kind as error:
            missing = [word for word in words if word not in str(error)]
            self.is_true(not missing, f"{type(error).__name__} does not say {missing}: {error}")
            return error
        raise AssertionError(f"nothing was raised, but {kind.__name__} must be; the call returned {result!r:.200}")

    # --------------------------------------------------------------------------------------- differentiation
    def gradients(
        self, function: Callable[..., Any], primals: Sequence[Any], cotangent: Any, parameters: Sequence[Any] = ()
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """The output of ``function(*primals)`` on the host, and the gradients of primals and parameters."""
        tensors = [self.tensor(p) if isinstance(p, np.ndarray) else p for p in primals]
        output, pullback = self.platform.vjp(function, *tensors, parameters=parameters)
        gradients = pullback(self.tensor(cotangent) if isinstance(cotangent, np.ndarray) else cotangent)
        expected = len(tensors) + len(parameters)
        self.is_true(
            len(gradients) == expected, f"the pullback returned {len(gradients)} gradients for {expected} inputs"
        )
        absent = [i for i, gradient in enumerate(gradients) if gradient is None]
        self.is_true(not absent, f"gradients {absent} are absent (None); they must be zeros")
        host = self.platform.to_host(output, *gradients)
        return host[0], list(host[1:])

    # --------------------------------------------------------------------------------------------- the world
    def mesh(self, shape: Sequence[int], names: Sequence[str]) -> DeviceMesh:
        """A mesh over the world's first ranks; collective over the world when it is first asked for.

        Checks that need the same mesh share it: a world that lives through hundreds of checks would hold as many
        groups otherwise, and in some frameworks each of them has threads, which never rest.
        """
        meshes = vars(self.platform).setdefault(_MESHES, {})
        key = (tuple(shape), tuple(names))
        if key not in meshes:
            meshes[key] = init_device_mesh(self.platform, *key)
        return meshes[key]

    def members(self, ranks: Sequence[int]) -> Group:
        """A group of *ranks*; collective over the world. The world itself needs no group."""
        everyone = list(range(self.ranks))
        return None if list(ranks) == everyone else self.platform.new_group(list(ranks))

    @contextmanager
    def counting(self, *members: str) -> Iterator[dict[str, int]]:
        """Count the calls of platform members inside the block, also those that other members make.

        The counting functions are set on the platform object and shadow its methods; afterwards they are gone.
        """
        calls = dict.fromkeys(members, 0)

        def counted(name: str, member: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                calls[name] += 1
                return member(*args, **kwargs)

            return call

        for name in members:
            setattr(self.platform, name, counted(name, getattr(self.platform, name)))
        try:
            yield calls
        finally:
            for name in members:
                delattr(self.platform, name)
