# SPDX-License-Identifier: Apache-2.0
"""The source of a layer, for scripts that do without this package."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hyperep_torch.audit.module_subject import ModuleSubject

__all__ = ["script_of"]


def script_of(subject: ModuleSubject) -> str | None:
    """Not yet."""
    return None
