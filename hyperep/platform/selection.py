# SPDX-License-Identifier: Apache-2.0
"""Which platform is meant: the rules, from the most explicit to the least.

1. the name that is passed to :func:`get_platform`;
2. the platform of the innermost :func:`use_platform` block;
3. the environment variable ``HYPEREP_PLATFORM``;
4. the only viable platform;
5. the viable platform of uniquely highest priority;
6. otherwise an error that lists every candidate with its reason.

Rules 4 and 5 choose for somebody who named nothing, so they must not hide what they passed over. A candidate that
cannot be used, and that might have been chosen if it could, is named in a :class:`PlatformPassedOver` warning. A
platform of negative priority (the loopback reference platform) is never chosen in place of such a candidate: it always
works, and a training run that ends up on it because a driver is missing would be a silent fallback.
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from hyperep.platform.candidate import Candidate, State
from hyperep.platform.completion import completed
from hyperep.platform.errors import PlatformError, PlatformNotFound, PlatformPassedOver
from hyperep.platform.protocol import Platform
from hyperep.platform.registry import BLOCK_VARIABLE, Registry, default_registry

if TYPE_CHECKING:
    from hyperep.mesh import DeviceMesh

__all__ = ["PLATFORM_VARIABLE", "adopt_mesh", "choose", "get_platform", "live_platforms", "select", "use_platform"]

PLATFORM_VARIABLE = "HYPEREP_PLATFORM"
"""Environment variable: the name of the platform to use where nothing more explicit is said."""

_scope: ContextVar[tuple[Platform[Any], ...]] = ContextVar("hyperep_platforms_in_scope", default=())
"""Platforms of the open ``use_platform`` blocks, outermost first. Ranks that are threads each have their own."""


def get_platform(name: str | None = None, **options: Any) -> Platform[Any]:
    """Return the platform that *name*, the scope, the environment or the installation determines.

    *options* go to the platform's factory. The same name and options give the same object within a process; a
    platform that a :func:`use_platform` block holds is returned for its name instead, and takes no options any more.

    :raises PlatformNotFound: if no such platform is installed, or none can be chosen.
    :raises PlatformNotViable: if it is installed, but its framework or device is missing, or it is blocked.
    :raises PlatformBroken: if its plugin fails.
    :raises PlatformConflict: if two distributions register that name.
    :raises ValueError: if options are given for a platform that is already in scope.
    """
    for platform in reversed(_scope.get()):  # the innermost block first
        if name is None or platform.name == name:
            if options:
                raise ValueError(
                    f"options {options} cannot be given to platform {platform.name!r}, which is already in scope; "
                    f"give them where it is made, or leave the use_platform() block"
                )
            return platform
    candidate = select(name)
    assert candidate.spec is not None, "a viable candidate has a spec"
    return completed(default_registry().instances.get(candidate.spec, options))


def select(name: str | None = None) -> Candidate:
    """Return the viable candidate that *name*, the environment or the installation determines; makes nothing.

    :raises PlatformError: as :func:`get_platform` does.
    """
    registry = default_registry()
    from_environment = os.environ.get(PLATFORM_VARIABLE)
    if name is not None:
        return _named(registry, name)
    if from_environment:
        return _named(registry, from_environment, f" ({PLATFORM_VARIABLE}={from_environment})")
    return choose(registry.candidates())


@contextmanager
def use_platform(platform: Platform[Any] | str) -> Iterator[Platform[Any]]:
    """Make *platform* (an object, or a name for :func:`get_platform`) the one in scope for a ``with`` block.

    The scope belongs to the context (PEP 567): threads and tasks that others run do not see it.
    """
    held = get_platform(platform) if isinstance(platform, str) else platform
    token = _scope.set((*_scope.get(), held))
    try:
        yield held
    finally:
        _scope.reset(token)


def adopt_mesh(mesh: object) -> DeviceMesh:
    """Return *mesh* as the core's ``DeviceMesh``, also if it is a framework's own.

    The platforms that exist are asked first, the one in scope before others; then the one that would be selected.

    :raises TypeError: if none of them knows such a mesh.
    """
    from hyperep.mesh import DeviceMesh

    if isinstance(mesh, DeviceMesh):
        return mesh
    asked: list[str] = []
    cause: PlatformError | None = None
    for platform in live_platforms():
        if adopted := platform.adopt_mesh(mesh):
            return adopted
        asked.append(platform.name)
    try:
        selected = get_platform()
        if adopted := selected.adopt_mesh(mesh):
            return adopted
        asked.append(selected.name)
    except PlatformError as error:
        cause = error
    raise TypeError(
        f"mesh={mesh!r} of type {type(mesh).__module__}.{type(mesh).__qualname__} is neither a hyperep.DeviceMesh nor "
        f"a mesh of a platform in use ({', '.join(dict.fromkeys(asked)) or 'none'}); make one with "
        f"init_device_mesh(platform, shape, mesh_dim_names), or first make the platform that it belongs to with "
        f"get_platform(name)"
    ) from cause


def live_platforms() -> tuple[Platform[Any], ...]:
    """Return the platform objects there are: those in scope, innermost first, then those made so far."""
    found: list[Platform[Any]] = []
    for platform in (*reversed(_scope.get()), *default_registry().instances.live()):
        if not any(platform is other for other in found):
            found.append(platform)
    return tuple(found)


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """Choose among *candidates* for somebody who named none: rules 4 to 6 of this module.

    :raises PlatformNotFound: with every candidate and its reason, if there is no one answer.
    """
    if not candidates:
        raise PlatformNotFound("no platform is installed; install one, for example: pip install hyperep-torch")
    viable = [candidate for candidate in candidates if candidate.state is State.VIABLE]
    if not viable:
        raise PlatformNotFound(_listing("no installed platform can be used here", candidates))
    highest = max(candidate.priority for candidate in viable)
    best = [candidate for candidate in viable if candidate.priority == highest]
    if len(best) > 1:
        names = ", ".join(repr(candidate.name) for candidate in best)
        raise PlatformNotFound(_listing(f"several platforms are viable with priority {highest} ({names})", candidates))
    (chosen,) = best
    # A broken plugin's priority may be unknown; what is known to rank lower would not have been chosen anyway.
    passed_over = [
        candidate
        for candidate in candidates
        if candidate.state in (State.NOT_VIABLE, State.BROKEN) and (candidate.priority >= chosen.priority)
    ]
    if passed_over and chosen.priority < 0:
        raise PlatformNotFound(
            _listing(f"{chosen.name!r} is for reference and never stands in for a platform that fails", candidates)
        )
    if passed_over:
        warnings.warn(
            PlatformPassedOver(_listing(f"platform {chosen.name!r} was chosen and others passed over", passed_over)),
            stacklevel=4,
        )
    return chosen


def _named(registry: Registry, name: str, asked_by: str = "") -> Candidate:
    """The viable candidate of that name; *asked_by* tells where the name came from."""
    names = registry.names()
    if name not in names:
        close = " or ".join(repr(match) for match in difflib.get_close_matches(name, names))
        raise PlatformNotFound(
            f"unknown platform {name!r}{asked_by}; installed: {', '.join(names) or 'none'}"
            + (f"; did you mean {close}?" if close else "")
        )
    candidate = registry.candidate(name)
    if candidate.state is not State.VIABLE:
        raise candidate.error(asked_by)
    return candidate


def _listing(headline: str, candidates: Sequence[Candidate]) -> str:
    lines = "".join(f"\n  {candidate.describe()}" for candidate in candidates)
    way_out = f"Name one: pass it to get_platform(), or set {PLATFORM_VARIABLE}; {BLOCK_VARIABLE} rules others out."
    return f"{headline}:{lines}\n{way_out}"
