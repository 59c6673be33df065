# SPDX-License-Identifier: Apache-2.0
"""The platform objects of a process, made once for each name and set of options."""

from __future__ import annotations

import inspect
import threading
import traceback
from typing import Any

from hyperep.platform.errors import PlatformBroken
from hyperep.platform.protocol import Platform
from hyperep.platform.reference import resolve
from hyperep.platform.spec import PlatformSpec

__all__ = ["Instances"]

_Key = tuple[str, frozenset[tuple[str, Any]]]


class Instances:
    """Platform objects by ``(name, options)``. Safe to use from several threads; a factory runs once."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # re-entrant: one platform's factory may ask for the platform it is built on
        self._made: dict[_Key, Platform[Any]] = {}

    def get(self, spec: PlatformSpec, options: dict[str, Any]) -> Platform[Any]:
        """Return the platform made with *options*, making it the first time.

        :raises TypeError: if the factory takes no such option, or an option's value cannot be hashed.
        :raises PlatformBroken: if the factory cannot be imported, or what it makes is another platform.
        """
        key = (spec.name, frozenset(_hashable(spec.name, options).items()))
        with self._lock:
            if key not in self._made:
                self._made[key] = _make(spec, options)
            return self._made[key]

    def live(self) -> tuple[Platform[Any], ...]:
        """Return the platforms made so far, oldest first."""
        with self._lock:
            return tuple(self._made.values())

    def forget(self, name: str) -> None:
        """Drop the platforms of one name; the objects themselves live on with whoever holds them."""
        with self._lock:
            self._made = {key: platform for key, platform in self._made.items() if key[0] != name}


def _hashable(name: str, options: dict[str, Any]) -> dict[str, Any]:
    for option, value in options.items():
        try:
            hash(value)
        except TypeError:
            raise TypeError(
                f"option {option}={value!r} of platform {name!r} cannot be hashed; a platform is made once for each "
                f"set of options: pass a tuple for a list"
            ) from None
    return options


def _make(spec: PlatformSpec, options: dict[str, Any]) -> Platform[Any]:
    try:
        factory = resolve(spec.factory)
    except KeyboardInterrupt:  # the user's
        raise
    except BaseException as error:  # also the panic of a Rust extension, and an import that calls sys.exit()
        raise PlatformBroken(
            f"platform {spec.name!r} is broken: its factory {spec.factory!r} cannot be imported: "
            f"{type(error).__name__}: {error}\n" + "".join(traceback.format_exception(error))
        ) from error
    if not callable(factory):
        raise PlatformBroken(f"platform {spec.name!r} is broken: its factory {spec.factory!r} cannot be called")
    try:
        signature = inspect.signature(factory)
    except ValueError:
        pass  # a factory that is compiled may have none; its own error for a wrong option must do
    else:
        try:
            signature.bind(**options)
        except TypeError as error:
            raise TypeError(
                f"platform {spec.name!r} does not take the options {options}: {error}; it takes {signature}"
            ) from None
    try:
        platform: Platform[Any] = factory(**options)
    except (Exception, KeyboardInterrupt):
        raise  # an error of a factory is its own
    except BaseException as error:
        raise PlatformBroken(
            f"platform {spec.name!r} is broken: its factory {spec.factory!r} ended with {type(error).__name__}: {error}"
        ) from error
    if getattr(platform, "name", None) != spec.name:
        raise PlatformBroken(
            f"platform {spec.name!r} is broken: its factory {spec.factory!r} made {platform!r}, "
            f"which is not a platform of that name"
        )
    return platform
