# SPDX-License-Identifier: Apache-2.0
"""A platform's ``xp`` made of a framework's functions that have other names, or call their arguments otherwise.

For authors. What differs from the Python Array API standard in more than names is a function of the author's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from hyperep.platform.array_subset import ARRAY_DTYPES, ARRAY_FUNCTIONS

__all__ = ["OPTIONAL_DTYPES", "array_namespace"]

OPTIONAL_DTYPES = ("float64", "float16", "bfloat16")
"""Dtypes that are capabilities; one that the platform does not declare must not be in the namespace."""


def array_namespace(
    *homes: object,
    names: Mapping[str, str] | None = None,
    keywords: Mapping[str, str] | None = None,
    own: Mapping[str, Any] | None = None,
    dtypes: tuple[str, ...] = OPTIONAL_DTYPES,
) -> SimpleNamespace:
    """A namespace with the functions and dtypes of :mod:`hyperep.platform.array_subset`, as far as they are found.

    A name that is found nowhere is absent; the requirement ``ID-surface`` lists all of them.

    Args:
        homes: where functions and dtypes are looked up, such as the framework's module; the first that has one wins.
        names: the standard's name -> the framework's, where they differ.
        keywords: the standard's name of an argument -> the framework's, in all functions: ``{"axis": "dim"}``.
        own: the author's functions and dtypes by the standard's names. They come first, and their arguments are those
            of the standard.
        dtypes: the optional dtypes that are wanted.

    >>> import numpy as np
    >>> own = {"permute_dims": lambda x, axes: x.transpose(axes)}
    >>> xp = array_namespace(np, names={"concat": "concatenate"}, own=own)
    >>> xp.permute_dims(xp.concat([np.zeros((1, 3)), np.ones((1, 3))], axis=0), (1, 0)).shape
    (3, 2)
    """
    own = own or {}
    unknown = set(names or {}) - set(ARRAY_FUNCTIONS) - set(ARRAY_DTYPES) - set(dtypes)
    if unknown:
        raise ValueError(f"names={sorted(unknown)} are not in hyperep.platform.array_subset; give the standard's names")
    found: dict[str, Any] = {}
    for name in (*ARRAY_FUNCTIONS, *ARRAY_DTYPES, *dtypes):
        theirs = (names or {}).get(name, name)
        home = next((home for home in homes if hasattr(home, theirs)), None)
        if name in own:
            found[name] = own[name]
        elif home is not None:
            member = getattr(home, theirs)
            found[name] = _with(member, keywords or {}) if name in ARRAY_FUNCTIONS else member
    return SimpleNamespace(**{**found, **own})


def _with(function: Callable[..., Any], keywords: Mapping[str, str]) -> Callable[..., Any]:
    """*function*, its keywords renamed."""
    if not keywords:
        return function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{keywords.get(key, key): value for key, value in kwargs.items()})

    return call
