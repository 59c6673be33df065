# SPDX-License-Identifier: Apache-2.0
"""Who else knows a parameter: other modules that share it, and those that go on holding the whole one.

A style puts a shard in the place of a parameter. An optimizer that was made before goes on training the whole one,
which nobody reads any more; and a module that shares the parameter would train alone.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from hyperep.distribute import own_parameters
from hyperep.platform.protocol import Module, Platform

__all__ = ["StaleParameters", "require_ties", "require_whole_ties", "ties", "watched"]

_watching: ContextVar[bool] = ContextVar("hyperep_watching_parameters", default=False)

_SHOWN = 3


class StaleParameters(UserWarning):
    """Whole parameters that were replaced by shards are still held by somebody, as by an optimizer made before."""


@contextmanager
def watched(platform: Platform[Any], module: Module) -> Iterator[None]:
    """Warn of whole parameters of *module* that are replaced inside the block and outlive it.

    Blocks nest; the outermost one looks, since a parameter that two modules share has its second holder until the
    second style was applied.
    """
    if _watching.get():
        yield
        return
    before = {name: weakref.ref(parameter) for name, parameter in platform.parameters(module).items()}
    token = _watching.set(True)
    try:
        yield
    finally:
        _watching.reset(token)
    stale = _alive(platform, module, before)
    if stale:
        gc.collect()  # what nobody but a cycle holds is held by nobody
        stale = _alive(platform, module, before)
    if stale:
        shown = ", ".join(map(repr, stale[:_SHOWN])) + (f" and {len(stale) - _SHOWN} more" if stale[_SHOWN:] else "")
        warnings.warn(
            StaleParameters(
                f"{shown}: shards have taken the place of these parameters, but something still holds the whole ones, "
                "such as an optimizer that was made before, or another module that shares them; it would go on with "
                "tensors that the model no longer reads. Apply styles first, then data parallelism, then make the "
                "optimizer; shared parameters go through parallelize_module of the module that holds both"
            ),
            stacklevel=4,
        )


def _alive(platform: Platform[Any], module: Module, before: Mapping[str, Any]) -> list[str]:
    now = platform.parameters(module)
    return [name for name, ref in before.items() if (old := ref()) is not None and now.get(name) is not old]


def ties(platform: Platform[Any], parts: Mapping[str, Module]) -> list[list[tuple[str, str]]]:
    """Parameters that several parts of a module share: for each the parts' paths, with its name there."""
    holders: dict[int, list[tuple[str, str]]] = {}
    for path, part in parts.items():
        for name, parameter in own_parameters(platform, part).items():
            holders.setdefault(id(parameter), []).append((path, name))
    return [shared for shared in holders.values() if len(shared) > 1]


def require_whole_ties(shared: list[list[tuple[str, str]]], sharded: Collection[str]) -> None:
    """Check that a plan reaches all holders of a parameter or none.

    Args:
        shared: from :func:`ties`.
        sharded: paths to which the plan applies styles that shard what is at and below them.

    Raises:
        ValueError: it reaches some of them.
    """
    for holders in shared:
        reached = [any(_below(path, root) for root in sharded) for path, _ in holders]
        if any(reached) and not all(reached):
            yes, no = (_named(holders[reached.index(wanted)]) for wanted in (True, False))
            raise ValueError(
                f"parameters {yes!r} and {no!r} are one (tied), but the plan shards {yes!r} only, which would untie "
                "them; give both parts a style that lays the parameter out alike, or untie them before"
            )


def require_ties(platform: Platform[Any], parts: Mapping[str, Module], shared: list[list[tuple[str, str]]]) -> None:
    """Check that parameters that were one still are.

    Raises:
        ValueError: a plan has untied some.
    """
    for (path, name), *others in shared:
        first = own_parameters(platform, parts[path]).get(name)
        for other, key in others:
            if own_parameters(platform, parts[other]).get(key) is not first:
                raise ValueError(
                    f"parameters {_named((path, name))!r} and {_named((other, key))!r} were one (tied), and the styles "
                    "of the plan have made two of them; lay both out alike, or untie them before"
                )


def _below(path: str, root: str) -> bool:
    return not root or path == root or path.startswith(f"{root}.")


def _named(holder: tuple[str, str]) -> str:
    return ".".join(filter(None, holder))
