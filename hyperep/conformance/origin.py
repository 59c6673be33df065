# SPDX-License-Identifier: Apache-2.0
"""Which commit the suite is of, where that can be told."""

from __future__ import annotations

import functools
import json
import subprocess
from importlib import metadata
from pathlib import Path

__all__ = ["commit_of", "suite_commit"]


@functools.cache
def suite_commit() -> str:
    """The commit of this suite, twelve digits, with ``+`` behind it where files were changed since; or nothing.

    It is known where hyperep runs from a checkout, and where pip installed it from one.
    """
    return commit_of(Path(__file__).parents[1]) or _installed_from()


def commit_of(folder: Path) -> str:
    """The commit of the checkout that *folder* is a part of; nothing if it is part of none."""
    if not _git(folder, "ls-files", "--error-unmatch", "__init__.py"):
        return ""  # a package that merely lies inside somebody's repository, such as a virtual environment
    commit = _git(folder, "rev-parse", "--short=12", "HEAD")
    return commit + ("+" if commit and _git(folder, "status", "--porcelain", "--", ".") else "")


def _installed_from() -> str:
    try:
        told = json.loads(metadata.distribution("hyperep").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return ""
    return str(told.get("vcs_info", {}).get("commit_id", ""))[:12]


def _git(folder: Path, *arguments: str) -> str:
    """What git says; nothing if it fails, or is not there."""
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
