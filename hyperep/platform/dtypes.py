# SPDX-License-Identifier: Apache-2.0
"""Which of the array subset's dtypes a framework's dtype is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["dtype_named"]


def dtype_named(xp: Any, dtype: Any, names: Iterable[str]) -> str | None:
    """The first of *names* by which the namespace has *dtype*; ``None`` if it is none of them.

    A platform may lack some of the names. Dtypes are compared with dtypes of the namespace alone: those of some
    frameworks raise where they are compared with anything else, such as the ``None`` of a dtype that is not there.

    >>> import numpy as np
    >>> dtype_named(np, np.dtype("int32"), ("bfloat16", "int64", "int32"))
    'int32'
    """
    return next((name for name in names if hasattr(xp, name) and dtype == getattr(xp, name)), None)
