# SPDX-License-Identifier: Apache-2.0
"""Matplotlib for pictures that are written to files, whatever the environment says about windows."""

from __future__ import annotations

import contextlib
import os
import sys

__all__ = ["import_matplotlib"]

_VARIABLE = "MPLBACKEND"


def import_matplotlib() -> None:
    """Import matplotlib, also where ``MPLBACKEND`` names a backend that is not there.

    A notebook sets the variable for its own kernel, and every process that is started from it gets it; matplotlib then
    refuses to be imported. The backend shows windows, and figures that are made as objects and saved need none.
    """
    if "matplotlib" in sys.modules:
        return
    named = os.environ.pop(_VARIABLE, None)  # an import that has failed once cannot be repeated without it
    try:
        import matplotlib
    finally:
        if named is not None:
            os.environ[_VARIABLE] = named
    if named:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = named
