# SPDX-License-Identifier: Apache-2.0
"""Whether files can be written where the user wants them: to be asked before the work whose result they are for."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["require_writable_file", "require_writable_folder"]


def require_writable_file(path: Path, option: str) -> None:
    """Check that *path*, given by *option*, can be written; writes nothing.

    Raises:
        ValueError: its folder is missing or cannot be written, or it is a directory or a file that cannot be written.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.parent}; make it, or name another file")
    if path.is_dir():
        raise ValueError(f"{option} {path} is a directory; name a file in it")
    if not os.path.lexists(path):
        require_writable_folder(folder, f"{option} {path}", "name another file")
    elif not os.access(path, os.W_OK):
        raise ValueError(f"{option} {path} cannot be written; name another file")


def require_writable_folder(folder: Path, what: str, way_out: str) -> None:
    """Check that files can be made in *folder*, by making one that is gone at once.

    Raises:
        ValueError: they cannot; the message begins with *what* and ends in *way_out*.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{what}: {folder} cannot be written ({error.strerror}); {way_out}") from error
