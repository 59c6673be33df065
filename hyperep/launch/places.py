# SPDX-License-Identifier: Apache-2.0
"""Where a thread stands, in one line: its innermost calls, the innermost first, and the innermost one of the author's.

Whoever looks at a rank that waits inside a framework wants to know which line of their own asked for it. *own* are the
folders and files that such lines are in, as :func:`code_of` finds them.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import PurePath
from types import FrameType, TracebackType

__all__ = ["code_of", "place_in_dump", "place_of_crash", "place_of_frame", "place_of_traceback"]

_SHOWN = 4
"""Calls shown: enough to get from a wait inside a framework to the code that asked for it."""
_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\S+) in (?P<function>.*)$', re.MULTILINE)
_THREAD = re.compile(r"^(?P<current>Current t|T)hread 0x0*(?P<number>[0-9a-f]+) .*$", re.MULTILINE)
_FATAL = "Fatal Python error"
_CORE = "hyperep"

_Call = tuple[str, str, str]
"""Function, file, line."""


def code_of(kind: type) -> tuple[str, ...]:
    """Where the code of *kind* and of the classes that it is made of lies: folders of packages, and single files.

    Of the core only what belongs to a platform counts, which is its reference platform's package.
    """
    found = []
    for base in kind.__mro__:
        top, _, rest = base.__module__.partition(".")
        if top == _CORE:
            top = base.__module__.rpartition(".")[0]
            if not rest or top in (_CORE, f"{_CORE}.platform", f"{_CORE}.launch"):
                continue
        file = getattr(sys.modules.get(top), "__file__", None)
        if file and top not in sys.stdlib_module_names:
            found.append(os.path.join(os.path.dirname(file), "") if PurePath(file).stem == "__init__" else file)
    return tuple(dict.fromkeys(found))


def place_in_dump(dump: str, thread: int | None, own: Sequence[str] = ()) -> str:
    """The place of *thread* (as ``threading.get_ident`` numbers it) in what :mod:`faulthandler` wrote last.

    Empty where the dump does not hold the thread.
    """
    return _last(dump, lambda heading: thread is not None and int(heading["number"], 16) == thread, own)


def place_of_crash(dump: str, own: Sequence[str] = ()) -> str:
    """The place of the thread that crashed, in what :mod:`faulthandler` wrote then; empty where nothing did."""
    _, fatal, rest = dump.rpartition(_FATAL)
    return _last(rest, lambda heading: heading["current"] != "T", own) if fatal else ""


def place_of_frame(frame: FrameType | None, own: Sequence[str] = ()) -> str:
    """The place of a thread of this process whose innermost frame is *frame*."""
    calls = []
    while frame is not None:
        calls.append((frame.f_code.co_name, frame.f_code.co_filename, str(frame.f_lineno)))
        frame = frame.f_back
    return _told(calls, own)


def place_of_traceback(traceback: TracebackType | None, own: Sequence[str] = (), *, shown: int = 1) -> str:
    """The place where an error was raised: its *shown* innermost calls, and the innermost one of the author's.

    Empty if none is to be shown and the author's code was not passed.
    """
    calls = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        calls.append((code.co_name, code.co_filename, str(traceback.tb_lineno)))
        traceback = traceback.tb_next
    return _told(calls[::-1], own, shown)


def _last(dump: str, wanted: Callable[[re.Match[str]], bool], own: Sequence[str]) -> str:
    headings = list(_THREAD.finditer(dump))
    for place, heading in reversed(list(enumerate(headings))):
        if wanted(heading):
            end = headings[place + 1].start() if place + 1 < len(headings) else len(dump)
            frames = _FRAME.finditer(dump, heading.end(), end)
            return _told([(f["function"], f["file"], f["line"]) for f in frames], own)
    return ""


def _told(calls: Sequence[_Call], own: Sequence[str], shown: int = _SHOWN) -> str:
    places = [f"{function} ({PurePath(file).name}:{line})" for function, file, line in calls]
    authors = next((i for i, (_, file, _) in enumerate(calls) if own and file.startswith(tuple(own))), -1)
    if authors < shown:
        return " < ".join(places[:shown])
    return " < ".join([*places[:shown], *(["..."] if authors > shown > 0 else []), places[authors]])
