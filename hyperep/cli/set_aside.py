# SPDX-License-Identifier: Apache-2.0
"""What this process and its libraries print, kept apart from what a command has to say."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["set_aside"]


@contextmanager
def set_aside() -> Iterator[Callable[[], str]]:
    """Keep all that is printed inside the block, also by native code; afterwards the given function returns it.

    What was printed is shown all the same if the block raises: it may say why.
    """
    kept: list[str] = []
    with tempfile.TemporaryFile() as file, os.fdopen(os.dup(file.fileno()), "w", buffering=1) as text:
        _flush()
        before = [os.dup(1), os.dup(2)]
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        failed = True
        try:
            # Also where the two are not those of this process, as in a notebook.
            with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                yield lambda: "".join(kept)
            failed = False
        finally:
            text.flush()
            _flush()
            for number, descriptor in enumerate(before, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)
            file.seek(0)
            kept.append(file.read().decode(errors="replace"))
            if failed:
                print(kept[0], end="", file=sys.stderr)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
