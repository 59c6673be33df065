# SPDX-License-Identifier: Apache-2.0
"""How long ranks may take over a step, or wait for one another, before their run is given up."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["DEFAULT_TIMEOUT", "TIMEOUT_VARIABLE", "step_timeout", "use_timeout"]

TIMEOUT_VARIABLE = "HYPEREP_TIMEOUT"
"""Environment variable: seconds that a step, or the wait for other ranks in a collective, may take."""

DEFAULT_TIMEOUT = 600.0
"""Seconds, where nobody says otherwise: far above any step, so that a rank that is slow is not taken for one that
hangs. Ranks that died, were stopped or cannot be reached are found long before."""


def step_timeout() -> float:
    """Seconds, as the environment says, or the default.

    Raises:
        ValueError: the variable is not a positive number.
    """
    text = os.environ.get(TIMEOUT_VARIABLE) or str(DEFAULT_TIMEOUT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(
            f"{TIMEOUT_VARIABLE}={text!r} must be a positive number of seconds, such as {DEFAULT_TIMEOUT:g}"
        )
    return seconds


@contextmanager
def use_timeout(seconds: float | None) -> Iterator[None]:
    """Let *seconds* be the timeout inside the block, here and in processes started there; ``None`` changes nothing.

    Raises:
        ValueError: it is not a positive number.
    """
    before = os.environ.get(TIMEOUT_VARIABLE)
    try:
        if seconds is not None:
            if not 0 < seconds < math.inf:
                raise ValueError(f"timeout={seconds:g} must be a positive number of seconds; see {TIMEOUT_VARIABLE}")
            os.environ[TIMEOUT_VARIABLE] = str(seconds)
        yield
    finally:
        if seconds is not None:
            os.environ.pop(TIMEOUT_VARIABLE, None)
            if before is not None:
                os.environ[TIMEOUT_VARIABLE] = before
