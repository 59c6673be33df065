# SPDX-License-Identifier: Apache-2.0
"""Every name of MindSpore that this package uses although MindSpore does not document it, and why.

They are those of MindSpore 2.10. All are imported here and nowhere else, so that a version that has moved one fails
with a message that says which.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

__all__ = [
    "NAMES",
    "PrivateName",
    "abandon_graphs",
    "as_written",
    "custom_function",
    "is_recording",
    "off_tape",
    "receive",
    "send",
]

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class PrivateName:
    """An undocumented name and the reason for its use."""

    module: str
    name: str
    reason: str

    def load(self) -> Any:
        """The object.

        Raises:
            ImportError: this version of MindSpore has no such name.
        """
        import mindspore

        try:
            return getattr(importlib.import_module(self.module), self.name)
        except (ImportError, AttributeError) as error:
            raise ImportError(
                f"mindspore {mindspore.__version__} has no {self.module}.{self.name}, which hyperep-mindspore needs: "
                f"{self.reason} Install mindspore 2.10, or a newer hyperep-mindspore"
            ) from error


CUSTOM_FUNCTION = PrivateName(
    module="mindspore.common._grad_function",
    name="_Function",
    reason=(
        "The functional way to give a Python function its own backward. The documented one, nn.Cell with bprop, wants "
        "a cell per call and hands the output to the backward in place of residuals."
    ),
)
SEND = PrivateName(
    module="mindspore.mint.distributed.distributed",
    name="dist_comm_isend_op",
    reason=(
        "The operator below mint.distributed.isend, which on the CPU asks for the rank in the Ascend group and fails."
    ),
)
RECEIVE = PrivateName(
    module="mindspore.mint.distributed.distributed",
    name="dist_comm_irecv_op",
    reason="The operator below mint.distributed.irecv, for the same reason.",
)
EXECUTOR = PrivateName(
    module="mindspore.graph.api",
    name="_pynative_executor",
    reason="It alone can say whether a graph is being recorded, and release those whose pullback was never called.",
)
NO_GRAD = PrivateName(
    module="mindspore.common",
    name="_no_grad",
    reason="It keeps raw collectives off the tape: the tape would issue each of them again in backward.",
)
MIXED_PRECISION = PrivateName(
    module="mindspore._c_expression",
    name="MixedPrecisionType",
    reason="Its NOTSET is the one way to keep Cell.to_float of a parent from casting every operand inside of a cell.",
)
NAMES = (CUSTOM_FUNCTION, SEND, RECEIVE, EXECUTOR, NO_GRAD, MIXED_PRECISION)

custom_function: Any = CUSTOM_FUNCTION.load()
send: Any = SEND.load()
receive: Any = RECEIVE.load()
_no_grad: Any = NO_GRAD.load()
_executor: Any = EXECUTOR.load()
as_written: Any = MIXED_PRECISION.load().NOTSET
"""The mixed precision of a cell whose operators get their operands as they are."""


def off_tape(function: Callable[P, R]) -> Callable[P, R]:
    """Have nothing recorded of what *function* does.

    MindSpore's context is a decorator too, but one that keeps the state to return to in itself: a decorated function
    that calls itself would leave the tape off for ever. So each call gets a context of its own.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with _no_grad():
            return function(*args, **kwargs)

    return wrapped


def is_recording() -> bool:
    """Whether operators are being recorded now."""
    return bool(_executor.grad_flag())


def abandon_graphs() -> None:
    """Release every graph whose pullback was not called, and with it the tensors that it holds."""
    _executor.clear_res()
