# SPDX-License-Identifier: Apache-2.0
"""The registry: every platform that is installed, and in which state it is.

Platforms are found by entry point (group ``hyperep.platforms``; the entry point's name is the platform's name) and
described by the pluggy hook ``hyperep_platform_spec``. A plugin is looked at when somebody asks for its name or for the
whole list, never before, and always guarded: whatever its import, its hook or its probe raises becomes a state with a
reason. No plugin can stop the host, vanish, or change what another plugin answers.
"""

from __future__ import annotations

import functools
import os
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pluggy

from hyperep.platform import hookspecs, versions
from hyperep.platform.candidate import Candidate, State
from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.discovery import Origin, discover
from hyperep.platform.errors import PlatformBroken, PlatformNotFound
from hyperep.platform.instances import Instances
from hyperep.platform.reference import is_reference, resolve
from hyperep.platform.spec import PlatformSpec, Viability

__all__ = ["BLOCK_VARIABLE", "Registry", "blocked_names", "default_registry", "register"]

BLOCK_VARIABLE = "HYPEREP_BLOCK"
"""Environment variable: names of platforms, separated by commas, that are ruled out."""


def blocked_names() -> frozenset[str]:
    """Return the platform names that ``HYPEREP_BLOCK`` rules out now."""
    return frozenset(name.strip() for name in os.environ.get(BLOCK_VARIABLE, "").split(",")) - {""}


class Registry:
    """Installed platforms by name. What a plugin answered is kept for as long as the registry lives.

    Safe to use from several threads; one of them looks at a plugin, the others wait for what it finds.
    """

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager(hookspecs.PROJECT)
        """The plugin manager; ``manager.set_blocked(name)`` rules a platform out."""
        self.manager.add_hookspecs(hookspecs)
        self.instances = Instances()
        """The platform objects that were made from this registry's specs."""
        self._lock = threading.RLock()
        self._candidates: dict[str, Candidate] = {}
        self._being_looked_at: set[str] = set()
        self._registered: list[Origin] = []

    @functools.cached_property
    def _discovered(self) -> list[Origin]:
        return discover()

    def _origins(self) -> dict[str, list[Origin]]:
        by_name: dict[str, list[Origin]] = {}
        for origin in [*self._discovered, *self._registered]:
            by_name.setdefault(origin.name, []).append(origin)
        return by_name

    def names(self) -> tuple[str, ...]:
        """Return the names of all platforms, sorted. Imports nothing of any plugin."""
        with self._lock:
            return tuple(sorted(self._origins()))

    def candidates(self) -> tuple[Candidate, ...]:
        """Look at every platform and return what was found, sorted by name. Imports frameworks that are there."""
        return tuple(self.candidate(name) for name in self.names())

    def candidate(self, name: str) -> Candidate:
        """Look at one platform, and at no other one.

        :raises PlatformNotFound: if no plugin registers *name*.
        :raises PlatformBroken: if a plugin asks for itself while it is being looked at.
        """
        with self._lock:
            origins = self._origins().get(name)
            if not origins:
                raise PlatformNotFound(f"no plugin registers a platform {name!r}; registered: {list(self.names())}")
            reason = self._why_blocked(name)
            if reason:
                return _candidate(origins, State.BLOCKED, reason)
            if name not in self._candidates:
                if name in self._being_looked_at:
                    raise PlatformBroken(
                        f"the plugin of platform {name!r} asks the registry for itself while it is being described or "
                        f"probed; describe the platform without asking for one"
                    )
                self._being_looked_at.add(name)
                try:
                    self._candidates[name] = self._look_at(origins)
                finally:
                    self._being_looked_at.discard(name)
            return self._candidates[name]

    @contextmanager
    def register(self, plugin: object, name: str) -> Iterator[None]:
        """Register a module or an object with a ``hyperep_platform_spec`` hook under *name*, for a ``with`` block."""
        value = getattr(plugin, "__name__", None) or type(plugin).__qualname__
        origin = Origin(name=name, distribution="", version="", value=value, load=lambda: plugin)
        with self._lock:
            self._registered.append(origin)
            self._forget(name)
        try:
            yield
        finally:
            with self._lock:
                self._registered.remove(origin)
                self._forget(name)

    def _forget(self, name: str) -> None:
        """Drop what was found out about *name*, because the plugins that claim it have changed."""
        self._candidates.pop(name, None)
        self.instances.forget(name)
        if self.manager.has_plugin(name):
            self.manager.unregister(name=name)

    def _why_blocked(self, name: str) -> str:
        if name in blocked_names():
            return f"ruled out by {BLOCK_VARIABLE}={os.environ[BLOCK_VARIABLE]}; take the name out of it to use it"
        if self.manager.is_blocked(name):
            return "ruled out by set_blocked() on the registry's plugin manager"
        return ""

    def _look_at(self, origins: list[Origin]) -> Candidate:
        """Describe and probe one platform; every failure of the plugin ends as a state, never as an exception."""
        if len(origins) > 1:
            return _candidate(origins, State.BROKEN, _conflict(origins))
        (origin,) = origins
        spec: PlatformSpec | None = None
        try:
            spec = self._describe(origin)
            if reason := versions.why_incompatible(spec, origin.distribution):
                return _candidate(origins, State.NOT_VIABLE, reason, spec=spec)
            viability = _probe(spec)
        except KeyboardInterrupt:  # the user's
            raise
        except BaseException as error:  # also an import that calls sys.exit(), and the panic of a Rust extension
            return _candidate(origins, State.BROKEN, _with_traceback(error), spec=spec)
        state = State.VIABLE if viability.viable else State.NOT_VIABLE
        return _candidate(origins, state, viability.reason, spec=spec, viability=viability)

    def _describe(self, origin: Origin) -> PlatformSpec:
        """Import a plugin, call its hook and check what it returns; raises whatever is wrong with it."""
        self.manager.register(origin.load(), name=origin.name)
        implementations = self.manager.hook.hyperep_platform_spec.get_hookimpls()
        # Called by itself and not through the manager, so that another plugin's failure cannot reach it.
        own = [implementation for implementation in implementations if implementation.plugin_name == origin.name]
        if not own:
            raise PlatformBroken(
                f"{origin} implements no hook hyperep_platform_spec; decorate a function of that name "
                f"with hyperep.platform.hookspecs.hookimpl"
            )
        return _checked(own[0].function(), origin)


@functools.cache
def default_registry() -> Registry:
    """Return the registry of this process: what is installed on ``sys.path``."""
    return Registry()


@contextmanager
def register(plugin: object, name: str) -> Iterator[None]:
    """Register a plugin with the registry of this process for a ``with`` block; see :meth:`Registry.register`."""
    with default_registry().register(plugin, name):
        yield


def _candidate(
    origins: list[Origin],
    state: State,
    reason: str,
    *,
    spec: PlatformSpec | None = None,
    viability: Viability | None = None,
) -> Candidate:
    return Candidate(
        name=origins[0].name,
        state=state,
        reason=reason,
        distributions=tuple(origin.distribution for origin in origins),
        versions=tuple(origin.version for origin in origins),
        spec=spec,
        viability=viability,
    )


def _conflict(origins: list[Origin]) -> str:
    claims = " and ".join(str(origin) for origin in origins)
    return f"{len(origins)} plugins register a platform {origins[0].name!r}: {claims}; uninstall all but one"


def _checked(spec: object, origin: Origin) -> PlatformSpec:
    """Return *spec* if it keeps the rules of specs; raise :class:`PlatformBroken` with all that it breaks."""
    if not isinstance(spec, PlatformSpec):
        raise PlatformBroken(f"hyperep_platform_spec() of {origin} returned {spec!r}; it must return a PlatformSpec")
    faults = []
    if spec.name != origin.name:
        faults.append(
            f"the spec's name {spec.name!r} differs from its entry point's name {origin.name!r}; they must be the same"
        )
    faults += versions.faults(spec)
    if not isinstance(spec.priority, int):
        faults.append(f"priority={spec.priority!r} must be an int")
    faults += [
        f"{field}={value!r} must be a 'package.module:name' string"
        for field, value in (("factory", spec.factory), ("probe", spec.probe), ("launcher", spec.launcher))
        if not is_reference(value) and not (field == "launcher" and value == "")
    ]
    if not isinstance(spec.capabilities, Mapping):
        faults.append(f"capabilities={spec.capabilities!r} must be a mapping of Capability to Support")
    else:
        faults += [
            f"capabilities holds {key!r}: {value!r}; it must map Capability to Support"
            for key, value in spec.capabilities.items()
            if not (isinstance(key, Capability) and isinstance(value, Support))
        ]
    if faults:
        raise PlatformBroken(f"the spec of {origin} breaks the rules: " + "; ".join(faults))
    return spec


def _probe(spec: PlatformSpec) -> Viability:
    probe = resolve(spec.probe)
    if not callable(probe):
        raise PlatformBroken(f"probe {spec.probe!r} is {probe!r}, which cannot be called")
    viability = probe()
    if not isinstance(viability, Viability):
        raise PlatformBroken(f"probe {spec.probe!r} returned {viability!r}; it must return a Viability")
    return viability


def _with_traceback(error: BaseException) -> str:
    try:
        summary = " ".join(str(error).split()) or "no message"
    except Exception:  # an exception is the plugin's own code as well
        summary = "its message cannot be had"
    return f"{type(error).__name__}: {summary}\n" + "".join(traceback.format_exception(error))
