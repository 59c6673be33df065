# SPDX-License-Identifier: Apache-2.0
"""The audit: which gradient is wrong in somebody's expert parallelism, and why. See ``docs/audit.md``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyperep.audit.claims import RELU_MLP, SWIGLU, Claims, Expert, Sizes
    from hyperep.audit.finding import Finding
    from hyperep.audit.platform_subject import PlatformSubject
    from hyperep.audit.report import AuditReport
    from hyperep.audit.run import check_layer
    from hyperep.audit.subject import NotOffered, Part, Specimen, Subject

__all__ = [
    "RELU_MLP",
    "SWIGLU",
    "AuditReport",
    "Claims",
    "Expert",
    "Finding",
    "NotOffered",
    "Part",
    "PlatformSubject",
    "Sizes",
    "Specimen",
    "Subject",
    "check_layer",
]

_HOME = {
    "claims": ("RELU_MLP", "SWIGLU", "Claims", "Expert", "Sizes"),
    "finding": ("Finding",),
    "platform_subject": ("PlatformSubject",),
    "report": ("AuditReport",),
    "run": ("check_layer",),
    "subject": ("NotOffered", "Part", "Specimen", "Subject"),
}


def __getattr__(name: str) -> Any:
    # Lazy: pytest imports this package for its plugin in every run.
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"hyperep.audit.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
