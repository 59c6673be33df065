# SPDX-License-Identifier: Apache-2.0
"""What a check calls on the platform: told before each call, so that it is known also if the rank dies of it."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

from hyperep.launch.doing import doing
from hyperep.platform.protocol import Platform

__all__ = ["LastCall", "told", "watching_calls"]

_METHODS = tuple(
    name
    for name, member in vars(Platform).items()
    if inspect.isfunction(member) and not name.startswith("_") and name != "is_tensor"
)
_OF_CHECKS = ("from_host", "to_host", "arange")
"""Members that checks call to make and to look at what they are about."""
_SHOWN = 16
"""Entries shown of a list."""


class LastCall:
    """The last member that was called, other than to make tensors and to look at them."""

    def __init__(self) -> None:
        self.text = ""
        """The call with its inputs, as :func:`told` writes them; empty before the first one."""
        self.place = ""
        """The member, and where the author wrote it: ``all_gather (platform.py:88)``."""


@contextmanager
def watching_calls(platform: Any, notes: Mapping[str, Any] | None = None) -> Iterator[LastCall]:
    """Tell each call of a member of *platform* inside the block before it is made, also those of other members.

    What *notes* hold by then is told with it, a line each: a rank that does not come back cannot show them. The telling
    functions shadow the methods on the platform object; afterwards they are gone. They hold no tensor.
    """
    last = LastCall()
    known = {} if notes is None else notes  # not its values of now: a check adds to them
    shadowed = []
    for name in _METHODS:
        # A platform under test may lack a member, fail when it is read, or take no attributes: then it is not watched.
        with contextlib.suppress(Exception):
            setattr(platform, name, _telling(last, name, getattr(platform, name), platform.is_tensor, known))
            shadowed.append(name)
    try:
        yield last
    finally:
        for name in shadowed:
            vars(platform).pop(name, None)  # a check that shadows members itself has taken it away already


def told(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], is_tensor: Callable[[object], bool]) -> str:
    """A call in one line: of tensors dtype and shape, everything else as it prints."""
    inputs = [_told(x, is_tensor) for x in args] + [f"{key}={_told(x, is_tensor)}" for key, x in kwargs.items()]
    return f"{name}({', '.join(inputs)})"


def _telling(
    last: LastCall,
    name: str,
    member: Callable[..., Any],
    is_tensor: Callable[[object], bool],
    notes: Mapping[str, Any],
) -> Callable[..., Any]:
    place = _place(name, member)

    @functools.wraps(member)
    def call(*args: Any, **kwargs: Any) -> Any:
        text = told(name, args, kwargs, is_tensor)
        if name not in _OF_CHECKS:
            last.text, last.place = text, place
        doing("\n".join([text, *(f"  {key}: {value}" for key, value in notes.items())]))
        return member(*args, **kwargs)

    return call


def _told(value: Any, is_tensor: Callable[[object], bool]) -> str:
    try:
        if is_tensor(value) is True:
            return f"{str(value.dtype).rpartition('.')[2]}{[int(size) for size in value.shape]}"
    except Exception:  # the platform's own code, which is under test
        return type(value).__name__
    if isinstance(value, list | tuple):
        parts = [_told(x, is_tensor) for x in value[:_SHOWN]] + (["..."] if len(value) > _SHOWN else [])
        return f"[{', '.join(parts)}]"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    return f"<{type(value).__name__}>"


def _place(name: str, member: Callable[..., Any]) -> str:
    code = getattr(inspect.unwrap(getattr(member, "__func__", member)), "__code__", None)
    return name if code is None else f"{name} ({PurePath(code.co_filename).name}:{code.co_firstlineno})"
