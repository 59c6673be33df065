# SPDX-License-Identifier: Apache-2.0
"""Every name of MindSpore that this package uses although MindSpore does not document it, and why.

They are those of MindSpore 2.10. All are imported here and nowhere else, so that a version that has moved one fails
with a message that says which.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

__all__ = [
    "NAMES",
    "RECORDERS",
    "PrivateName",
    "abandon_graphs",
    "as_written",
    "custom_function",
    "group_options",
    "grouped_product",
    "is_recording",
    "keep_source",
    "off_tape",
    "receive",
    "send",
]

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)


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
BYTECODE_COMPILER = PrivateName(
    module="mindspore.graph._utils.pijit_context",
    name="PIJitCaptureContext",
    reason="A frame of its file on the stack is the one sign that a cell is being compiled from its bytecode.",
)
TRACER = PrivateName(
    module="mindspore.graph.jit_trace",
    name="nested_run",
    reason="A frame of its file on the stack is the one sign that the operators of a cell are being traced.",
)
NOT_REWRITTEN = PrivateName(
    module="mindspore.rewrite.common.namespace",
    name="_subtree_black_list",
    reason=(
        "The cells whose source mixed precision O1 does not rewrite: a neutral forward is a closure, which it would "
        "copy without what it closes over."
    ),
)
GROUPED_PRODUCT = PrivateName(
    module="mindspore.ops.auto_generate",
    name="grouped_matmul_v4",
    reason="The one way to CANN's grouped product with sizes on the device; its text is MindSpore's, its place is not.",
)
GROUP_OPTIONS = PrivateName(
    module="mindspore._c_expression",
    name="GroupOptions",
    reason="What create_group takes for the size of HCCL's buffers; MindSpore's documentation has it in this place.",
)
NAMES = (
    *(CUSTOM_FUNCTION, SEND, RECEIVE, EXECUTOR, NO_GRAD, MIXED_PRECISION),
    *(BYTECODE_COMPILER, TRACER, NOT_REWRITTEN, GROUPED_PRODUCT, GROUP_OPTIONS),
)

custom_function: Any = CUSTOM_FUNCTION.load()
send: Any = SEND.load()
receive: Any = RECEIVE.load()
grouped_product: Any = GROUPED_PRODUCT.load()
group_options: Any = GROUP_OPTIONS.load()
_no_grad: Any = NO_GRAD.load()
_executor: Any = EXECUTOR.load()
as_written: Any = MIXED_PRECISION.load().NOTSET
"""The mixed precision of a cell whose operators get their operands as they are."""
RECORDERS = frozenset(inspect.getfile(name.load()) for name in (BYTECODE_COMPILER, TRACER))
"""The files whose functions run a cell while they record it."""


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


def keep_source(cell_class: C) -> C:
    """Have MindSpore leave cells of this class as they are where it rewrites the source of a network."""
    NOT_REWRITTEN.load().append(cell_class)
    return cell_class


def is_recording() -> bool:
    """Whether operators are being recorded now."""
    return bool(_executor.grad_flag())


def abandon_graphs() -> None:
    """Release every graph whose pullback was not called, and with it the tensors that it holds."""
    _executor.sync()  # operators that were issued and have not run yet still use what is released
    _executor.clear_res()
