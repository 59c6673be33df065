# SPDX-License-Identifier: Apache-2.0
"""``"module:callable"`` strings: how a spec refers to code without importing it."""

from __future__ import annotations

import pkgutil
import re

__all__ = ["is_reference", "resolve"]

_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_reference(text: object) -> bool:
    """Whether *text* has the form ``"package.module:name"`` (or ``"package.module:name.attribute"``)."""
    return isinstance(text, str) and _REFERENCE.fullmatch(text) is not None


def resolve(reference: str) -> object:
    """Import the module before the colon and return what the name after it is bound to.

    :raises ValueError: if *reference* has another form.
    :raises ImportError: if there is no such module; whatever else the import of the module raises.
    :raises AttributeError: if the module binds no such name.
    """
    if not is_reference(reference):
        raise ValueError(f"{reference!r} is not a reference; write it as 'package.module:name'")
    return pkgutil.resolve_name(reference)
