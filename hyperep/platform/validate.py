# SPDX-License-Identifier: Apache-2.0
"""``validate_platform``: every fault of an implementation's surface, listed at once.

What is checked is what can be seen without a second rank: that each member of the protocol is there, that it can be
called as the core calls it, and that what a platform says about itself is of the right kind. What the members *do* is
the conformance suite's matter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hyperep.platform.array_subset import ARRAY_ATTRIBUTES, ARRAY_DTYPES, ARRAY_FUNCTIONS, ARRAY_OPERATORS
from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.errors import PlatformError
from hyperep.platform.protocol import Platform

__all__ = ["Fault", "InvalidPlatform", "check_platform", "validate_platform"]


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with an implementation."""

    member: str
    """The member of the protocol: ``"all_gather"``, ``"xp.take"``."""
    rule: str
    """What was found and what the protocol asks for."""

    def __str__(self) -> str:
        return f"{self.member}: {self.rule}"


class InvalidPlatform(PlatformError):
    """An implementation does not have the surface of the protocol; the message lists every fault."""

    def __init__(self, platform: str, faults: tuple[Fault, ...]) -> None:
        self.platform = platform
        self.faults = faults
        listed = "".join(f"\n  {fault}" for fault in faults)
        super().__init__(
            f"{platform} is not a platform, {len(faults)} faults:{listed}\n"
            f"The rules are in hyperep.platform.protocol; inherit hyperep.platform.base.PlatformBase for defaults."
        )

    def __reduce__(self) -> tuple[type, tuple[str, tuple[Fault, ...]]]:
        return type(self), (self.platform, self.faults)


def validate_platform(obj: object) -> list[Fault]:
    """Return every fault of *obj* as a platform; an empty list if there is none.

    Reads the members, and makes one tensor to look at its operators; issues no collective.
    """
    if isinstance(obj, type):
        return [Fault("platform", f"{obj.__qualname__} is a class; validate an object made from it")]
    faults = [*_surface_faults(obj), *_attribute_faults(obj)]
    # Operators are looked up on a tensor, which only a platform whose other members are in order can make.
    return faults or list(_tensor_faults(obj))


def check_platform(obj: object) -> None:
    """Raise :class:`InvalidPlatform` with every fault of *obj*, if it has any."""
    faults = validate_platform(obj)
    if faults:
        raise InvalidPlatform(repr(obj), tuple(faults))


# ------------------------------------ members, signatures
def _surface_faults(obj: object) -> Iterator[Fault]:
    for name, declared in vars(Platform).items():
        if name.startswith("_"):
            continue
        if isinstance(declared, property):
            if inspect.getattr_static(obj, name, None) is None:
                yield Fault(name, "missing; the protocol declares it as a property")
        elif inspect.isfunction(declared):
            yield from (Fault(name, rule) for rule in _method_faults(declared, obj, name))


def _method_faults(declared: Callable[..., Any], obj: object, name: str) -> Iterator[str]:
    wanted = list(inspect.signature(declared).parameters.values())[1:]  # without self
    try:
        method = getattr(obj, name)
    except AttributeError:
        yield f"missing; the protocol declares {name}{inspect.signature(declared)}"
        return
    except Exception as error:
        yield f"reading it raised {type(error).__name__}: {error}"
        return
    if not callable(method):
        yield f"is {method!r}, which cannot be called"
        return
    try:
        found = inspect.signature(method).parameters
    except ValueError:
        return  # compiled code may have no signature to compare
    yield from _signature_faults(wanted, found)


def _signature_faults(wanted: list[inspect.Parameter], found: Mapping[str, inspect.Parameter]) -> Iterator[str]:
    """Compare parameters: every call that the protocol allows must be one that the implementation takes."""
    kinds = inspect.Parameter
    takes_any_keyword = any(parameter.kind is kinds.VAR_KEYWORD for parameter in found.values())
    takes_any_position = any(parameter.kind is kinds.VAR_POSITIONAL for parameter in found.values())
    by_position = [p.name for p in found.values() if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    for index, parameter in enumerate(wanted):
        name = parameter.name
        if parameter.kind is kinds.VAR_POSITIONAL:
            if not takes_any_position:
                yield f"must take any number of positional arguments, *{name}"
            continue
        own = found.get(name)
        if own is None or own.kind in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD):
            by_keyword = takes_any_keyword
            in_place = takes_any_position and len(by_position) <= index
        else:
            by_keyword = own.kind is not kinds.POSITIONAL_ONLY
            in_place = name in by_position and by_position.index(name) == index
            if parameter.default is not kinds.empty and own.default is kinds.empty:
                yield f"parameter {name!r} must have the default {parameter.default!r}"
            elif parameter.default is not kinds.empty and own.default != parameter.default:
                yield f"parameter {name!r} has the default {own.default!r}; it must be {parameter.default!r}"
        if parameter.kind is kinds.POSITIONAL_OR_KEYWORD and not in_place:
            yield f"must take {name!r} as positional argument {index + 1}; it takes {by_position}"
        elif not by_keyword:
            yield f"must take {name!r} by keyword"
    names = {parameter.name for parameter in wanted}
    for own in found.values():
        if (
            own.name not in names
            and own.default is kinds.empty
            and own.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
        ):
            yield f"parameter {own.name!r} is not in the protocol; give it a default"


# ------------------------------------ properties
def _attribute_faults(obj: object) -> Iterator[Fault]:
    values: dict[str, Any] = {}
    for name in ("name", "device", "capabilities", "rank", "world_size", "xp"):
        if inspect.getattr_static(obj, name, None) is None:
            continue  # reported as missing
        try:
            values[name] = getattr(obj, name)
        except Exception as error:
            yield Fault(name, f"reading it raised {type(error).__name__}: {error}")
    for name in values.keys() & {"name", "device"}:
        if not (isinstance(values[name], str) and values[name]):
            yield Fault(name, f"is {values[name]!r}; it must be a string that is not empty")
    if "capabilities" in values:
        yield from _capability_faults(values["capabilities"])
    for name in values.keys() & {"rank", "world_size"}:
        if not _is_int(values[name]):
            yield Fault(name, f"is {values[name]!r}; it must be an int")
    if all(_is_int(values.get(name)) for name in ("rank", "world_size")):
        rank, world_size = values["rank"], values["world_size"]
        if world_size < 1:
            yield Fault("world_size", f"is {world_size}; a world has at least one rank")
        if not 0 <= rank < max(world_size, 1):
            yield Fault("rank", f"is {rank}; it must be at least 0 and below world_size={world_size}")
    if "xp" in values:
        for name in (*ARRAY_FUNCTIONS, *ARRAY_DTYPES):
            if not hasattr(values["xp"], name):
                yield Fault(f"xp.{name}", "missing; see hyperep.platform.array_subset")
            elif name in ARRAY_FUNCTIONS and not callable(getattr(values["xp"], name)):
                yield Fault(f"xp.{name}", f"is {getattr(values['xp'], name)!r}, which cannot be called")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _capability_faults(capabilities: object) -> Iterator[Fault]:
    if not isinstance(capabilities, Mapping):
        yield Fault("capabilities", f"is {capabilities!r}; it must be a mapping of Capability to Support")
        return
    for capability, support in capabilities.items():
        if not isinstance(capability, Capability):
            yield Fault("capabilities", f"has the key {capability!r}; keys must be members of Capability")
        if not isinstance(support, Support):
            yield Fault("capabilities", f"{capability} is {support!r}; values must be members of Support")


# ------------------------------------ tensors
def _tensor_faults(platform: Any) -> Iterator[Fault]:
    try:
        tensor = platform.arange(3)
        is_tensor = platform.is_tensor(tensor)
    except Exception as error:
        yield Fault("arange", f"arange(3) raised {type(error).__name__}: {error}")
        return
    if is_tensor is not True:
        yield Fault("is_tensor", f"is_tensor(arange(3)) is {is_tensor!r}; it must be True")
    for name in (*ARRAY_ATTRIBUTES, *ARRAY_OPERATORS):
        if not hasattr(tensor, name):
            yield Fault(f"tensor.{name}", f"{type(tensor).__qualname__} has none; see hyperep.platform.array_subset")
    if getattr(tensor, "shape", (3,)) != (3,):
        yield Fault("arange", f"arange(3) has the shape {tensor.shape!r}; it must be (3,)")
