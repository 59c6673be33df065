# SPDX-License-Identifier: Apache-2.0
"""Files that are replaced whole: who is killed, or loses power, while writing leaves the old one or the new one."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["PARTIAL", "make_directory", "sync", "write_durably"]

PARTIAL = ".partial"
"""What the name of a file ends in while it is being written; after a kill, it is all that is left of it."""


def write_durably(path: Path, write: Callable[[Path], object]) -> None:
    """Replace *path* by the file that *write* makes under the name that it is called with.

    The content is on the disk before the name is, and the name before this returns.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        write(partial)
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def make_directory(path: Path) -> None:
    """Make a directory, and those above it, that last as long as what is written into them."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no such call for directories, and need none.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
