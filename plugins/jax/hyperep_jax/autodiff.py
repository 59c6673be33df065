# SPDX-License-Identifier: Apache-2.0
"""``vjp`` and ``custom_vjp`` by JAX's own functions of these names."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from hyperep.platform.protocol import Backward, Forward

__all__ = ["custom_vjp", "read", "value", "vjp"]


class _Custom(threading.local):
    """Whether this thread is in a custom forward or backward, where nothing of an enclosing vjp is traced."""

    inside = False


_custom = _Custom()


@contextlib.contextmanager
def _custom_is(inside: bool) -> Iterator[None]:
    before, _custom.inside = _custom.inside, inside
    try:
        yield
    finally:
        _custom.inside = before


def read(bound: Any) -> Any:
    """What a parameter is worth here: in a custom forward or backward a constant, whatever an enclosing vjp traces."""
    return value(bound) if _custom.inside else bound


def value(x: Any) -> jax.Array:
    """The array behind a tensor that is being differentiated."""
    while isinstance(x, jax.core.Tracer):
        x = x.primal
    return x


def custom_vjp(forward: Forward, backward: Backward) -> Callable[..., Any]:
    """See :meth:`hyperep.platform.protocol.Platform.custom_vjp`."""

    def call(*inputs: Any) -> Any:
        # A new function for each call: which inputs need a gradient is known to its forward and told to its backward.
        needed: list[bool] = []

        def fwd(*primals: Any) -> tuple[Any, tuple[Any, ...]]:
            needed[:] = [bool(p.perturbed) for p in primals]
            with _custom_is(True):
                return forward(*(p.value for p in primals))

        def bwd(residuals: tuple[Any, ...], cotangents: Any) -> tuple[Any, ...]:
            several = cotangents if isinstance(cotangents, tuple) else (cotangents,)
            whole = tuple(jnp.zeros(c.shape, c.dtype) if isinstance(c, SymbolicZero) else c for c in several)
            with _custom_is(True):
                gradients = backward(residuals, whole, tuple(needed))
            return tuple(g if wanted else None for g, wanted in zip(gradients, needed, strict=True))

        def plain(*inputs: Any) -> Any:
            with _custom_is(True):
                return forward(*inputs)[0]

        function = jax.custom_vjp(plain)
        function.defvjp(fwd, bwd, symbolic_zeros=True)
        return function(*inputs)

    return call


def vjp(
    function: Callable[..., Any],
    primals: Sequence[jax.Array],
    bind: Callable[[Sequence[Any]], Sequence[Any]],
    parameters: Sequence[jax.Array],
) -> tuple[Any, Callable[..., tuple[jax.Array, ...]]]:
    """Evaluate ``function(*primals)``; see :meth:`hyperep.platform.protocol.Platform.vjp`.

    *bind* puts values of the *parameters* where modules read them, and returns those that were there: an enclosing
    ``vjp`` may have put its own.
    """

    def bound(*values: Any) -> Any:
        before = bind(values[len(primals) :])
        try:
            with _custom_is(False):
                return function(*values[: len(primals)])
        finally:
            bind(before)

    # Tensors of an enclosing vjp are constants here, and what is returned is one there.
    given = [value(x) for x in (*primals, *parameters)]
    outputs, pull = jax.vjp(bound, *given)

    def pullback(*cotangents: jax.Array) -> tuple[jax.Array, ...]:
        plain = tuple(map(value, cotangents))
        gradients = pull(plain if isinstance(outputs, tuple) else plain[0])
        # Integers have no gradient in JAX, but one of type "float0".
        return tuple(
            jnp.zeros_like(x) if g.dtype == jax.dtypes.float0 else value(g)
            for g, x in zip(gradients, given, strict=True)
        )

    return tuple(map(value, outputs)) if isinstance(outputs, tuple) else value(outputs), pullback
