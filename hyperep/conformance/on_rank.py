# SPDX-License-Identifier: Apache-2.0
"""What runs on the ranks: one check, whose outcome goes back as plain data."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

from hyperep.conformance.calls import LastCall, watching_calls
from hyperep.conformance.case import Case
from hyperep.conformance.catalogue import find
from hyperep.launch.places import code_of, place_of_traceback
from hyperep.platform.capabilities import complete
from hyperep.platform.errors import UnsupportedCapability
from hyperep.platform.protocol import Platform
from hyperep.platform.removals import used_by_class

__all__ = ["check", "describe"]


def check(
    platform: Platform[Any], *, requirement: str, seed: int, ranks: int, declared: Mapping[str, str]
) -> dict[str, Any]:
    """Run one check on this rank.

    Returns:
        ``outcome``: ``"met"`` (with ``ratio`` and ``message`` after a measurement), ``"refused"`` (by
        UnsupportedCapability, with ``capability``) or ``"failed"``; then ``message`` (one line), ``traceback``,
        ``where`` (the same on all ranks that failed at one place), ``place`` (in the author's files), ``call`` (the
        last one, with its inputs) and ``notes``.
    """
    case = Case(platform=platform, requirement=requirement, seed=seed, ranks=ranks, declared=declared)
    with watching_calls(platform, case.notes) as last:
        try:
            find(requirement).check(case)
        except UnsupportedCapability as error:
            refused = getattr(error.capability, "value", str(error.capability))
            return {**_failure(case, error, last), "outcome": "refused", "capability": refused}
        except Exception as error:
            return _failure(case, error, last)
    if case.measurements:
        ratio, text = max(case.measurements)
        return {"outcome": "met", "ratio": ratio, "message": text}
    return {"outcome": "met"}


def describe(platform: Platform[Any]) -> dict[str, Any]:
    """What a report says of the platform itself."""
    supports = {c.value: s.value for c, s in complete(platform.capabilities).items()}
    announced = [removal.announce(platform.name) for removal in used_by_class(type(platform))]
    return {"name": platform.name, "device": platform.device, "capabilities": supports, "announced": announced}


def _failure(case: Case, error: Exception, last: LastCall) -> dict[str, Any]:
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first one is check() above
    text = f"{error}" if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
    return {
        "outcome": "failed",
        "message": text,
        "traceback": "".join(traceback.format_exception(type(error), error, error.__traceback__)),
        "where": [(frame.name, frame.lineno) for frame in frames],
        "place": place_of_traceback(error.__traceback__, code_of(type(case.platform)), shown=0) or last.place,
        "call": last.text,
        "notes": {key: repr(value) if not isinstance(value, str) else value for key, value in case.notes.items()},
    }
