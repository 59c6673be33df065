# SPDX-License-Identifier: Apache-2.0
"""The conformance suite: what every platform must do, checked on real ranks.

``check_platform(name)`` runs it from a program or notebook; ``hyperep conformance run`` and
``pytest --pyargs hyperep.conformance`` are the same from a shell.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyperep.conformance.report import Report
    from hyperep.conformance.suite import check_platform

__all__ = ["Report", "check_platform"]

_HOME = {"Report": "hyperep.conformance.report", "check_platform": "hyperep.conformance.suite"}


def __getattr__(name: str) -> Any:
    # Lazy: pytest imports this package for its plugin in every run, also in those that have nothing to do with it.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
