# SPDX-License-Identifier: Apache-2.0
"""The training text: bytes of files, and nothing else."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["Text", "load_text"]

_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True, eq=False)
class Text:
    """What a run trains on."""

    tokens: np.ndarray
    """uint8 ``[bytes]``."""
    name: str
    """Where it comes from, for whoever started the run: may hold a path."""
    source: str
    """The same for readers of its report, who need not know where its files lie."""
    files: int
    digest: str
    """SHA-256 of the bytes."""


def load_text(path: str | None, *, at_least: int = 1) -> Text:
    """Read a file, all files below a directory, or the source of the running interpreter's standard library.

    Files are read in the order of their names, so that every rank has the same text. In a directory, hidden files and
    files with a NUL byte, which are no text, are left out.

    Args:
        path: file or directory; ``None`` is the standard library.
        at_least: bytes that the run needs.

    Raises:
        OSError: there is no such path, something in it cannot be read, or this interpreter has no source files.
        ValueError: the text is empty, or shorter than *at_least*, or something in it is no file that ends.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [file for file in _files(root, _NOT_THE_LIBRARY) if file.suffix == ".py"]
        source = f"source of the standard library of Python {sysconfig.get_python_version()}"
        name = f"{source} ({root})"
        if not files:
            raise FileNotFoundError(f"this Python has no source files in {root}; name a text with --text FILE or DIR")
    else:
        root, name, source = Path(path), path, Path(path).name or path
        if not root.exists():
            raise FileNotFoundError(f"text {path!r} does not exist; --text takes a file or a directory")
        files = [file for file in _files(root) if file.name[0] != "."] if root.is_dir() else [root]
    parts = [part for part in (_read(name, file) for file in files) if len(files) == 1 or b"\0" not in part]
    content = b"\n".join(parts)
    if not content:
        raise ValueError(f"text {name!r} is empty: no byte of text in {len(files)} files; name another one with --text")
    if len(content) < at_least:
        raise ValueError(
            f"text {name!r} has {len(content)} bytes, but one sequence and the byte after it need {at_least}; name a "
            f"longer text with --text, or choose a smaller --seq-len"
        )
    tokens = np.frombuffer(content, dtype=np.uint8)
    digest = hashlib.sha256(content).hexdigest()
    return Text(tokens=tokens, name=name, source=source, files=len(parts), digest=digest)


def _files(root: Path, left_out: Set[str] = frozenset()) -> Iterator[Path]:
    """All files below *root* in the order of their names, without directories that are hidden or *left_out*."""

    def refuse(error: OSError) -> None:
        raise _unreadable(str(root), error) from error

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = sorted(name for name in folders if name not in left_out and name[0] != ".")
        yield from (Path(folder, name) for name in sorted(files))


def _read(text: str, file: Path) -> bytes:
    """The bytes of a regular file. Anything else (a FIFO, a device) may never end, or be empty when read again."""
    try:
        if not (file.is_file() or os.path.samefile(file, os.devnull)):
            raise ValueError(
                f"text {text!r}: {file} is no regular file (but a FIFO, a socket or a device); name a file, or a "
                f"directory of files, with --text"
            )
        return file.read_bytes()
    except OSError as error:
        raise _unreadable(text, error) from error


def _unreadable(text: str, error: OSError) -> OSError:
    message = f"text {text!r}: {error.filename} cannot be read ({error.strerror}); mend that, or name another --text"
    return OSError(message)
