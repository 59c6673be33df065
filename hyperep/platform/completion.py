# SPDX-License-Identifier: Apache-2.0
"""Members that came to the protocol after a plugin was written, for platforms that inherit nothing."""

from __future__ import annotations

import inspect
import types
from typing import Any

from hyperep.platform.base import PlatformBase
from hyperep.platform.errors import PlatformBroken

__all__ = ["DEFAULTS", "completed"]

DEFAULTS = {
    name: member
    for name, member in vars(PlatformBase).items()
    if inspect.isfunction(member) and not name.startswith("_") and not hasattr(member, "__isabstractmethod__")
}
"""The members of the protocol that can be built on others."""


def completed(platform: Any) -> Any:
    """Give *platform* the members that it lacks and that have a default, and return it.

    Who inherits :class:`hyperep.platform.base.PlatformBase` has them already. A platform that inherits nothing has
    those that the protocol had when it was written; a member that came later, with a default, must not break it.

    Raises:
        PlatformBroken: its class allows no attributes to be set.
    """
    for name in [name for name in DEFAULTS if not hasattr(platform, name)]:
        try:
            setattr(platform, name, types.MethodType(DEFAULTS[name], platform))
        except AttributeError:
            raise PlatformBroken(
                f"{platform!r} has no {name!r} and takes no attributes, so it cannot be given the default; define it, "
                "or inherit hyperep.platform.base.PlatformBase"
            ) from None
    return platform
