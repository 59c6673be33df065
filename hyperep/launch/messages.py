# SPDX-License-Identifier: Apache-2.0
"""What the starter of a world and its rank processes say to each other, as pickles over a socket pair."""

from __future__ import annotations

import pickle
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hyperep.launch.launcher import Launcher
from hyperep.launch.places import place_of_traceback
from hyperep.launch.plan import RankProcess

__all__ = ["Finished", "Hello", "Raised", "Ready", "Task", "raised"]


@dataclass(frozen=True, kw_only=True)
class Hello:
    """The first message to a process: which ranks it is to host."""

    launcher: Launcher
    platform_name: str
    process: RankProcess


@dataclass(frozen=True, kw_only=True)
class Task:
    """A program to run on every rank: ``function(platform, **arguments)``."""

    program: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Ready:
    """A rank has its platform and waits for tasks."""

    rank: int
    thread: int
    """``threading.get_ident()`` of the thread that it is."""


@dataclass(frozen=True)
class Finished:
    """A rank's result of the task."""

    rank: int
    result: Any
    at: float
    """``time.monotonic()``, as for an error."""


@dataclass(frozen=True, kw_only=True)
class Raised:
    """A rank's error, as text and, where that is possible, as the exception itself."""

    rank: int
    at: float
    """``time.monotonic()``, which all processes of a machine share: the order of the ranks' errors."""
    summary: str
    traceback: str
    place: str
    """Where it was raised, in one line."""
    module: str
    """Where the exception's class is defined."""
    pickled: bytes

    def exception(self) -> BaseException | None:
        """The exception, unless unpickling it would import something (a framework, perhaps) into this process."""
        if not self.pickled or self.module not in sys.modules:
            return None
        try:
            error = pickle.loads(self.pickled)
        except Exception:  # an exception's own __reduce__ may be anything
            return None
        return error if isinstance(error, BaseException) else None


def raised(rank: int, error: BaseException, own: Sequence[str] = ()) -> Raised:
    """The message that says that *rank* raised *error*; *own* are the author's files, see ``hyperep.launch.places``."""
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:  # pickling runs the exception's own code
        pickled = b""
    return Raised(
        rank=rank,
        at=time.monotonic(),
        summary="".join(traceback.format_exception_only(error)).strip(),
        traceback="".join(traceback.format_exception(error)),
        place=place_of_traceback(error.__traceback__, own),
        module=type(error).__module__,
        pickled=pickled,
    )
