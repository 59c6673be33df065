# SPDX-License-Identifier: Apache-2.0
"""Ports to meet on. Between the moment one is found free and the moment it is used, somebody else may take it."""

from __future__ import annotations

import re
import socket

__all__ = ["free_port", "port_was_taken"]

_TAKEN = re.compile(r"EADDRINUSE|address (is )?already in use|failed to bind", re.IGNORECASE)
"""How systems and most libraries say it."""


def free_port() -> int:
    """A port of the loopback address that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_was_taken(text: str) -> bool:
    """Whether *text*, of an error, says that a port was in use by somebody else."""
    return _TAKEN.search(text) is not None
