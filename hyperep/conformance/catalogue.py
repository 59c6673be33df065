# SPDX-License-Identifier: Apache-2.0
"""All requirements, in an order in which every one comes after those that it needs."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from hyperep.conformance.requirement import Requirement

__all__ = ["REQUIREMENT_MODULES", "find", "lacking", "requirements"]

REQUIREMENT_MODULES = (
    "identity",
    "host",
    "arrays",
    "autodiff",
    "array_gradients",
    "rows",
    "collectives",
    "gradients",
    "groups",
    "subgroups",
    "modules",
    "bits",
    "nested",
    "functional",
    "dispatching",
    "tokens",
    "styles",
    "native",
    "precision",
    "sizes",
    "ownership",
    "state",
    "order",
    "one_sided",
    "shards",
    "token_styles",
    "speed",
    "chunks",
    "balanced",
)
"""Modules of ``hyperep.conformance.requirements``: one a part of the protocol, in the order of the report."""


@functools.cache
def requirements() -> Mapping[str, Requirement]:
    """Every requirement by its id; the order is that of running and of reports."""
    found = [r for module in REQUIREMENT_MODULES for r in _defined_in(_import(module))]
    return {r.id: r for r in _sorted(found)}


def find(id: str) -> Requirement:
    """The requirement of that id.

    Raises:
        ValueError: there is none.
    """
    known = requirements()
    if id not in known:
        raise ValueError(f"there is no requirement {id!r}; list them with: hyperep conformance list")
    return known[id]


def lacking(ran: Iterable[str]) -> list[str]:
    """The requirements that are not among *ran*: a report that lacks some was made by an older suite."""
    return sorted(requirements().keys() - set(ran))


def _import(name: str) -> Any:
    return importlib.import_module(f"hyperep.conformance.requirements.{name}")


def _defined_in(module: Any) -> Iterable[Requirement]:
    """The requirements of a module, and those in tuples where one function makes several, in order of definition."""
    for value in vars(module).values():
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Requirement):
                yield item


def _sorted(found: list[Requirement]) -> list[Requirement]:
    """Stable topological order by ``needs``.

    Raises:
        ValueError: two have one id, one needs what there is not, or some need each other.
    """
    by_id = {r.id: r for r in found}
    if len(by_id) != len(found):
        raise ValueError(f"ids given twice: {sorted({r.id for r in found if found.count(r) > 1})}")
    done: dict[str, Requirement] = {}

    def visit(r: Requirement, path: tuple[str, ...]) -> None:
        if r.id in done:
            return
        if r.id in path:
            raise ValueError(f"requirements need each other: {' -> '.join((*path, r.id))}")
        for need in r.needs:
            if need not in by_id:
                raise ValueError(f"{r.id} needs {need!r}, which there is not")
            visit(by_id[need], (*path, r.id))
        done[r.id] = r

    for r in found:
        visit(r, ())
    return list(done.values())
