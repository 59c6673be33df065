# SPDX-License-Identifier: Apache-2.0
"""``custom_vjp`` and ``vjp`` on MindSpore's PyNative tape.

``mindspore.vjp`` records while it evaluates, and its pullback runs the backward of the graph **recorded last**: with
two pullbacks open, calling the older one first gives the gradients of the younger, or an error. So the recordings are
counted here, and a pullback whose turn it is not records its function again first. That is always right, and costs a
second forward only where pullbacks are called out of order.

MindSpore cannot record inside of a custom function's forward: its pullback finds no graph later. A ``vjp`` there
evaluates, and its pullback, which runs in a backward, records.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor, ops

from hyperep.platform.protocol import Backward, Forward
from hyperep_mindspore import private_names

__all__ = ["custom_vjp", "vjp"]

_FLOATS = (ms.float16, ms.bfloat16, ms.float32, ms.float64)


class _CustomVjp(private_names.custom_function):
    """One call of a function made by :func:`custom_vjp`.

    The two functions are arguments and not closed over by a class of their own: MindSpore keeps the class of the last
    call alive. Cotangents of outputs that were not used are materialised as zeros by MindSpore.
    """

    @staticmethod
    def forward(ctx: Any, forward: Forward, backward: Backward, *inputs: Tensor) -> Any:
        with _off_the_tape():
            outputs, residuals = forward(*inputs)
        ctx.save_for_backward(*residuals)
        ctx.pullback = backward
        ctx.dtypes = [x.dtype for x in inputs]
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        # Integer primals are marked as well.
        needed = tuple(n and d in _FLOATS for n, d in zip(ctx.needs_input_grad[2:], ctx.dtypes, strict=True))
        gradients = ctx.pullback(tuple(ctx.saved_tensors or ()), cotangents, needed)
        return (None, None, *(g if wanted else None for g, wanted in zip(gradients, needed, strict=True)))


def custom_vjp(forward: Forward, backward: Backward) -> Callable[..., Any]:
    """A differentiable function made of *forward* and *backward*; see the protocol."""
    return functools.partial(_CustomVjp.apply, forward, backward)


def vjp(
    function: Callable[..., Any], *primals: Tensor, parameters: Sequence[Parameter] = ()
) -> tuple[Any, Callable[..., tuple[Tensor, ...]]]:
    """Evaluate *function* and return its outputs and its pullback; see the protocol."""
    # Tensors of their own: one that the function closes over, or that is given twice, would get one gradient for all.
    primals = tuple(map(ops.stop_gradient, primals))
    recording = _Recording(function, primals, tuple(parameters))
    outputs = function(*primals) if _custom_forwards.depth else recording.record()
    count = len(outputs) if isinstance(outputs, tuple) else 1
    if private_names.is_recording():
        # An enclosing vjp takes what this one returns for constants.
        outputs = _constants(outputs)

    def pullback(*cotangents: Tensor) -> tuple[Tensor, ...]:
        if len(cotangents) != count:
            raise ValueError(f"{len(cotangents)} cotangents for {count} outputs; give one for each")
        gradients = recording.pull(cotangents)
        return _constants(gradients) if private_names.is_recording() else gradients

    return outputs, pullback


def _constants(tensors: Any) -> Any:
    return tuple(map(ops.stop_gradient, tensors)) if isinstance(tensors, tuple) else ops.stop_gradient(tensors)


_open_graphs: list[weakref.ref[_Recording]] = []
"""Whose graphs were recorded and not pulled back, oldest first, as the executor has them: one stack per process."""


class _CustomForwards(threading.local):
    """How many forwards of custom functions this thread is in."""

    depth = 0


_custom_forwards = _CustomForwards()


@contextlib.contextmanager
def _off_the_tape() -> Iterator[None]:
    _custom_forwards.depth += 1
    try:
        yield
    finally:
        _custom_forwards.depth -= 1


class _Recording:
    """A function, its inputs, and MindSpore's pullback of it."""

    def __init__(
        self, function: Callable[..., Any], primals: tuple[Tensor, ...], parameters: tuple[Parameter, ...]
    ) -> None:
        self._function = function
        self._primals = primals
        self._parameters = parameters
        self._pullback: Callable[..., Any] | None = None
        weakref.finalize(self, _release_abandoned).atexit = False

    def record(self) -> Any:
        """Evaluate the function with the tape on, as the youngest graph."""
        error: BaseException | None = None
        function = self._function  # and not self, which holds MindSpore's pullback: a cycle would live on

        def guarded(*inputs: Tensor) -> Any:
            nonlocal error
            try:
                return function(*inputs)
            except BaseException as raised:
                # An exception that passes through the executor leaves it recording for ever.
                error = raised
                return ops.zeros((1,), dtype=ms.float32)

        weights = [p for p in self._parameters if p.requires_grad]
        outputs, self._pullback = ms.vjp(guarded, *self._primals, weights=weights or None)
        if error is not None:
            # The constant depends on nothing, so this runs no backward; it ends the graph.
            self._pullback(ops.zeros((1,), dtype=ms.float32))
            raise error
        _open_graphs.append(weakref.ref(self))
        return outputs

    def pull(self, cotangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradients of primals and parameters; see the module's docstring for the order."""
        if not _open_graphs or _open_graphs[-1]() is not self:
            self.record()
        assert self._pullback is not None
        _open_graphs.pop()
        gradients, weight_gradients = self._pullback(*cotangents), ()
        _release_abandoned()
        if any(p.requires_grad for p in self._parameters):
            gradients, weight_gradients = gradients
        found = iter(weight_gradients)
        return (
            *(_present(g, x) for g, x in zip(gradients, self._primals, strict=True)),
            *(_present(next(found) if p.requires_grad else None, p) for p in self._parameters),
        )


def _release_abandoned() -> None:
    """Free the graphs of pullbacks that nobody can call any more, if there are no others."""
    if _open_graphs and not private_names.is_recording() and all(graph() is None for graph in _open_graphs):
        private_names.abandon_graphs()
        _open_graphs.clear()


def _present(gradient: Tensor | None, like: Tensor) -> Tensor:
    return ops.zeros(like.shape, like.dtype) if gradient is None else gradient
