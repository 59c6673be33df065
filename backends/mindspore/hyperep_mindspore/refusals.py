# SPDX-License-Identifier: Apache-2.0
"""MindSpore's compilers and transformations, under which hyperep's cells refuse to run, and in which words.

hyperep runs operator by operator (PyNative): how many rows travel is known only when the router has chosen. There are
two ways into a graph. Most compilers read the source of ``construct``; what they find, by ``__wrapped__``, is
:func:`construct_in_a_graph`. The others run ``construct`` while they record it; they are seen on the stack.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from hyperep_mindspore import private_names

__all__ = ["REFUSAL", "construct_in_a_graph", "refuse_recorders", "refusing_graphs"]

F = TypeVar("F", bound=Callable[..., Any])

REFUSAL = (
    "hyperep runs in PyNative mode: this cell exchanges as many rows as its router has chosen, which no graph knows "
    "beforehand. Leave it out of ms.jit, ms.vmap and AutoParallel, and set ms.set_context(mode=ms.PYNATIVE_MODE); "
    "compile the cells between such cells, one by one, and call this one from plain Python"
)


def construct_in_a_graph(self: Any, *inputs: Any, **kwargs: Any) -> Any:
    """What a compiler reads in place of a construct of hyperep's.

    Raises:
        RuntimeError: always, while it compiles.
    """
    raise RuntimeError(REFUSAL)


def refusing_graphs(construct: F) -> F:
    """Have compilers that read the source of *construct* refuse it; calls of it stay as they are."""
    construct.__wrapped__ = construct_in_a_graph  # type: ignore[attr-defined]
    return construct


def refuse_recorders() -> None:
    """Refuse to be recorded; to be called first, since the bytecode compiler ends the process over what follows.

    Raises:
        RuntimeError: the bytecode compiler or the tracer is running this.
    """
    frame = sys._getframe(1).f_back
    while frame is not None:
        if frame.f_code.co_filename in private_names.RECORDERS:
            raise RuntimeError(REFUSAL)
        frame = frame.f_back
