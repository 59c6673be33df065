# SPDX-License-Identifier: Apache-2.0
"""Reverse-mode differentiation for the loopback platform, on the tape of the ``autograd`` package."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import autograd.builtins
import numpy as np
from autograd.core import VJPNode, add_outgrads
from autograd.extend import defvjp_argnums, primitive
from autograd.tracer import getval, isbox, new_box
from autograd.util import toposort

from hyperep.platform.protocol import Backward, Forward

__all__ = ["custom_vjp", "plain", "vjp"]

_depth = threading.local()


def plain(x: Any) -> np.ndarray:
    """The array behind a tensor, whichever functions are being differentiated."""
    while isbox(x):
        x = getval(x)
    return np.asarray(x)


class _Call:
    """One call of a custom function: its two halves, and the residuals between them."""

    def __init__(self, forward: Forward, backward: Backward, inputs: int) -> None:
        self.forward, self.backward, self.inputs = forward, backward, inputs
        self.residuals: tuple[Any, ...] = ()

    def run(self, inputs: tuple[Any, ...]) -> Any:
        outputs, self.residuals = self.forward(*inputs)
        return outputs

    def pull(self, cotangent: Any, argnums: Sequence[int], inputs: Sequence[Any]) -> tuple[Any, ...]:
        # Argument 0 of the primitive is this record, so input i is its argument i + 1.
        needed = tuple(i + 1 in argnums for i in range(self.inputs))
        cotangents = tuple(cotangent) if isinstance(cotangent, tuple) else (cotangent,)
        gradients = self.backward(self.residuals, tuple(map(plain, cotangents)), needed)
        picked = ((gradients[n - 1], inputs[n - 1]) for n in argnums)
        return tuple(np.zeros_like(x) if g is None else plain(g) for g, x in picked)


@primitive
def _custom(call: _Call, *inputs: Any) -> Any:
    return call.run(inputs)


def _custom_vjp(argnums: Sequence[int], answer: Any, args: Sequence[Any], kwargs: Any) -> Callable[..., Any]:
    call, *inputs = args
    values = [plain(x) for x in inputs]
    return lambda g: call.pull(g, argnums, values)


defvjp_argnums(_custom, _custom_vjp)


def custom_vjp(forward: Forward, backward: Backward) -> Callable[..., Any]:
    """See :meth:`hyperep.platform.protocol.Platform.custom_vjp`."""
    return lambda *inputs: _custom(_Call(forward, backward, len(inputs)), *inputs)


def vjp(
    function: Callable[..., Any],
    primals: Sequence[np.ndarray],
    bind: Callable[[Sequence[Any]], Sequence[Any]],
    parameters: Sequence[np.ndarray],
) -> tuple[Any, Callable[..., tuple[np.ndarray, ...]]]:
    """Evaluate ``function(*primals)`` on a new tape; see :meth:`hyperep.platform.protocol.Platform.vjp`.

    *bind* is called with the traced *parameters* before the function runs, so that modules read them, and with what it
    returned then after it: an enclosing ``vjp`` may trace the same ones. The tape's level is counted per thread: the
    package's own counter is shared by all threads, and ranks are threads here.
    """
    # Tensors of an enclosing vjp are constants here, and what is returned is one there.
    values = [plain(x) for x in (*primals, *parameters)]
    roots = [VJPNode.new_root() for _ in values]
    level = getattr(_depth, "value", 0)
    _depth.value = level + 1
    boxes = [new_box(value, level, root) for value, root in zip(values, roots, strict=True)]
    before = bind(boxes[len(primals) :])
    try:
        outputs = function(*boxes[: len(primals)])
    finally:
        bind(before)
        _depth.value = level
    several = isinstance(outputs, tuple)
    end = autograd.builtins.tuple(outputs) if several else outputs
    recorded = isbox(end) and end._trace == level

    def pullback(*cotangents: np.ndarray) -> tuple[np.ndarray, ...]:
        found: dict[Any, Any] = {}
        if recorded:
            seed = tuple(map(plain, cotangents)) if several else plain(cotangents[0])
            found = _backward(end._node, seed, roots)
        return tuple(found.get(root, np.zeros_like(value)) for root, value in zip(roots, values, strict=True))

    return tuple(map(plain, outputs)) if several else plain(outputs), pullback


def _backward(end: Any, seed: Any, roots: Sequence[Any]) -> dict[Any, np.ndarray]:
    """Walk the tape from *end* in reverse and return the gradient of each root that was reached."""
    wanted = set(roots)
    gradients: dict[Any, Any] = {end: (seed, False)}
    found: dict[Any, np.ndarray] = {}
    for node in toposort(end):
        gradient = gradients.pop(node)
        if node in wanted:
            found[node] = plain(gradient[0])
            continue
        for parent, ingoing in zip(node.parents, node.vjp(gradient[0]), strict=True):
            gradients[parent] = add_outgrads(gradients.get(parent), ingoing)
    return found
