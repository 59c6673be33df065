# SPDX-License-Identifier: Apache-2.0
"""Where a thread stands, in one line: its innermost calls, the innermost first."""

from __future__ import annotations

import re
from pathlib import PurePath
from types import FrameType

__all__ = ["place_in_dump", "place_of_frame"]

_SHOWN = 4
"""Calls shown: enough to get from a wait inside a framework to the code that asked for it."""
_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\S+) in (?P<function>.*)$', re.MULTILINE)
_THREAD = re.compile(r"^(?:Current t|T)hread 0x0*(?P<number>[0-9a-f]+) .*$", re.MULTILINE)


def place_in_dump(dump: str, thread: int | None) -> str:
    """The place of *thread* (as ``threading.get_ident`` numbers it) in what :mod:`faulthandler` wrote last.

    Empty where the dump does not hold the thread.
    """
    headings = list(_THREAD.finditer(dump))
    for place, heading in reversed(list(enumerate(headings))):
        if thread is not None and int(heading["number"], 16) == thread:
            end = headings[place + 1].start() if place + 1 < len(headings) else len(dump)
            frames = _FRAME.finditer(dump, heading.end(), end)
            return _told([(f["function"], f["file"], f["line"]) for f in frames])
    return ""


def place_of_frame(frame: FrameType | None) -> str:
    """The place of a thread of this process whose innermost frame is *frame*."""
    calls = []
    while frame is not None:
        calls.append((frame.f_code.co_name, frame.f_code.co_filename, str(frame.f_lineno)))
        frame = frame.f_back
    return _told(calls)


def _told(calls: list[tuple[str, str, str]]) -> str:
    return " < ".join(f"{function} ({PurePath(file).name}:{line})" for function, file, line in calls[:_SHOWN])
