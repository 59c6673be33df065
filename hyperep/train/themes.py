# SPDX-License-Identifier: Apache-2.0
"""Colours of the pictures, for light and for dark pages."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DARK", "LIGHT", "Theme"]


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours by what they are for; the report's style sheet has the same ones."""

    name: str
    page: str
    ink: str
    faint: str
    """Axes, grid and secondary text."""
    line: str
    accent: str


LIGHT = Theme(name="light", page="#ffffff", ink="#1b2430", faint="#8b95a3", line="#2f6fde", accent="#d9632b")
DARK = Theme(name="dark", page="#171c24", ink="#e6eaf0", faint="#7d8896", line="#6ea8ff", accent="#ff9a62")
