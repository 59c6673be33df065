# SPDX-License-Identifier: Apache-2.0
"""``vjp``, ``custom_vjp`` and ``stop_gradient``: everything else about gradients rests on these."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from hyperep.conformance.case import Case
from hyperep.conformance.memory import freed
from hyperep.conformance.requirement import Level, requirement
from hyperep.platform.capabilities import Capability

PORT = "autodiff"
_AUTODIFF = (Capability.AUTODIFF,)


@requirement(
    "VJP-gradients",
    "vjp returns the output, and a pullback that gives the gradient of every primal.",
    port=PORT,
    capabilities=_AUTODIFF,
    needs=("HOST-roundtrip",),
)
def vjp_gradients(case: Case) -> None:
    x, y, g = (case.normal((3, 2), n) for n in range(3))
    out, (gx, gy) = case.gradients(lambda x, y: x * y + x, [x, y], g)
    case.close(out, x * y + x, "output")
    case.close(gx, g * (y + 1), "gradient of the first primal")
    case.close(gy, g * x, "gradient of the second primal")


@requirement(
    "VJP-unused",
    "What does not influence the output gets a gradient of zeros, never None.",
    port=PORT,
    capabilities=_AUTODIFF,
    needs=("VJP-gradients",),
)
def vjp_unused(case: Case) -> None:
    x, y, g = (case.normal((3, 2), n) for n in range(3))
    _, (gx, gy) = case.gradients(lambda x, y: 2 * x, [x, y], g)
    case.equal(gx, 2 * g, "gradient of the primal in use")
    case.equal(gy, np.zeros_like(y), "gradient of the unused primal")
    constant = case.tensor(np.ones((3, 2), np.float32))
    _, gradients = case.gradients(lambda x, y: constant + 0, [x, y], g)
    for gradient in gradients:
        case.equal(gradient, np.zeros_like(x), "gradient where no primal is in use")


@requirement(
    "VJP-several-outputs",
    "A function may return a tuple of tensors; the pullback takes one cotangent for each.",
    port=PORT,
    capabilities=_AUTODIFF,
    needs=("VJP-gradients",),
)
def vjp_several(case: Case) -> None:
    x, g, h = case.normal((3, 2), 0), case.normal((3, 2), 1), case.normal((2,), 2)
    outputs, pullback = case.platform.vjp(lambda x: (3 * x, case.xp.sum(x, axis=0)), case.tensor(x))
    case.is_true(isinstance(outputs, tuple) and len(outputs) == 2, f"the outputs are a {type(outputs).__name__}")
    case.close(outputs[1], x.sum(axis=0), "second output")
    (gradient,) = pullback(case.tensor(g), case.tensor(h))
    case.close(gradient, 3 * g + h, "gradient")


@requirement(
    "VJP-again",
    "Each vjp is on its own: gradients of one call are not added to those of another.",
    port=PORT,
    capabilities=_AUTODIFF,
    needs=("VJP-gradients",),
)
def vjp_again(case: Case) -> None:
    x = case.tensor(case.normal((3,), 0))
    g = np.ones(3, np.float32)
    for _ in range(2):
        _, (gradient,) = case.gradients(lambda x: 5 * x, [x], g)
        case.equal(gradient, 5 * g, "gradient")
    # Two under way at once, pulled back in the order in which they were made.
    _, pull_first = case.platform.vjp(lambda x: 2 * x, x)
    _, pull_second = case.platform.vjp(lambda x: 3 * x, x)
    case.equal(pull_first(case.tensor(g))[0], 2 * g, "gradient of the first of two")
    case.equal(pull_second(case.tensor(g))[0], 3 * g, "gradient of the second of two")


@requirement(
    "VJP-empty",
    "Primals and outputs without elements have gradients of their own shape.",
    port=PORT,
    capabilities=_AUTODIFF,
    needs=("VJP-gradients",),
)
def vjp_empty(case: Case) -> None:
    none, w = np.zeros((0, 3), np.float32), case.normal((3, 2), 1)
    _, (gx, gw) = case.gradients(lambda x, w: x @ w, [none, w], np.zeros((0, 2), np.float32))
    case.equal(gx, none, "gradient of the rows")
    case.equal(gw, np.zeros_like(w), "gradient of the weight")


@requirement(
    "STOP-gradient",
    "stop_gradient keeps the values and lets no gradient through.",
    port=PORT,
    capabilities=_AUTODIFF,
    needs=("VJP-unused",),
)
def stop_gradient(case: Case) -> None:
    x, g = case.normal((3, 2), 0), case.normal((3, 2), 1)
    # Of an input, and of what has a history of its own, as in a softmax.
    for factor, where in ((1.0, "an input"), (2.0, "an intermediate result")):

        def function(x: Any, factor: float = factor) -> Any:
            return x * case.platform.stop_gradient(x if factor == 1.0 else x * factor)

        out, (gradient,) = case.gradients(function, [x], g)
        case.close(out, x * x * factor, f"output, stopped at {where}")
        case.close(gradient, g * x * factor, f"gradient, stopped at {where}")


@requirement(
    "CUSTOM-gradients",
    "custom_vjp uses the backward that it is given, with the residuals of the forward.",
    port=PORT,
    capabilities=_AUTODIFF,
    needs=("VJP-gradients",),
)
def custom_gradients(case: Case) -> None:
    # A backward that is not the derivative, so that a platform that differentiates the forward is found out.
    function = case.platform.custom_vjp(
        lambda x, y: (x * y, (x, y)),
        lambda residuals, cotangents, needed: (cotangents[0] * residuals[1] * 10, cotangents[0] * residuals[0] * 100),
    )
    x, y, g = (case.normal((3, 2), n) for n in range(3))
    out, (gx, gy) = case.gradients(lambda x, y: function(x, y) + x, [x, y], g)
    case.close(out, x * y + x, "output")
    case.close(gx, g * y * 10 + g, "gradient of the first input")
    case.close(gy, g * x * 100, "gradient of the second input")


@requirement(
    "CUSTOM-calls",
    "A function from custom_vjp may be called any number of times; each call has residuals of its own.",
    port=PORT,
    capabilities=_AUTODIFF,
    needs=("CUSTOM-gradients",),
)
def custom_calls(case: Case) -> None:
    square = case.platform.custom_vjp(
        lambda x: (x * x, (x,)), lambda residuals, cotangents, needed: (2 * residuals[0] * cotangents[0],)
    )
    x, g = case.normal((4,), 0), case.normal((4,), 1)
    _, (gradient,) = case.gradients(lambda x: square(square(x)) + square(3 * x), [x], g)
    case.close(gradient, g * (4 * x**3 + 18 * x), "gradient")


@requirement(
    "CUSTOM-several-outputs",
    "A custom forward may return several tensors; the cotangent of one that is not used arrives as zeros.",
    port=PORT,
    capabilities=_AUTODIFF,
    needs=("CUSTOM-gradients",),
)
def custom_several(case: Case) -> None:
    both = case.platform.custom_vjp(
        lambda x: ((2 * x, 3 * x), ()),
        lambda residuals, cotangents, needed: (2 * cotangents[0] + 3 * cotangents[1],),
    )
    x, g = case.normal((4,), 0), case.normal((4,), 1)
    for name, pick, want in (
        ("both", lambda x: sum(both(x)), 5 * g),
        ("the first", lambda x: both(x)[0], 2 * g),
        ("the second", lambda x: both(x)[1], 3 * g),
    ):
        _, (gradient,) = case.gradients(pick, [x], g)
        case.close(gradient, want, f"gradient where {name} is used")


@requirement(
    "CUSTOM-needed",
    "The custom backward learns which inputs need a gradient, and may give None for the others.",
    port=PORT,
    capabilities=_AUTODIFF,
    needs=("CUSTOM-gradients",),
)
def custom_needed(case: Case) -> None:
    seen: list[tuple[bool, ...]] = []

    def backward(residuals: Any, cotangents: Any, needed: tuple[bool, ...]) -> tuple[Any, ...]:
        seen.append(tuple(bool(n) for n in needed))
        x, y = residuals
        return (cotangents[0] * y if needed[0] else None, cotangents[0] * x if needed[1] else None)

    product = case.platform.custom_vjp(lambda x, y: (x * y, (x, y)), backward)
    x, y, g = (case.normal((3,), n) for n in range(3))
    constant = case.tensor(y)
    _, (gradient,) = case.gradients(lambda x: product(x, constant), [x], g)
    case.close(gradient, g * y, "gradient of the first input, the second being a constant")
    constant = case.tensor(x)
    _, (gradient,) = case.gradients(lambda y: product(constant, y), [y], g)
    case.close(gradient, g * x, "gradient of the second input, the first being a constant")
    case.is_true(seen == [(True, False), (False, True)], f"needed was {seen}, must be [(True, False), (False, True)]")


@requirement(
    "CUSTOM-not-recorded",
    "Nothing inside a custom forward is recorded, also where it reads a tensor from outside.",
    port=PORT,
    capabilities=_AUTODIFF,
    needs=("CUSTOM-gradients",),
)
def custom_not_recorded(case: Case) -> None:
    def function(x: Any) -> Any:
        outside = 7 * x
        # The forward closes over a value that is being differentiated; only the backward below may count.
        scaled = case.platform.custom_vjp(lambda y: (y * outside, ()), lambda r, c, needed: (c[0],))
        return scaled(x)

    x, g = case.normal((3,), 0), case.normal((3,), 1)
    _, (gradient,) = case.gradients(function, [x], g)
    case.equal(gradient, g, "gradient")


@requirement(
    "CUSTOM-strided-cotangent",
    "A custom backward gets transposed and expanded cotangents by their values.",
    port=PORT,
    capabilities=_AUTODIFF,
    needs=("CUSTOM-gradients",),
)
def custom_strided(case: Case) -> None:
    xp = case.xp
    same = case.platform.custom_vjp(lambda x: (x + 0, ()), lambda residuals, cotangents, needed: (2 * cotangents[0],))
    x, g = case.normal((3, 2), 0), case.normal((2, 3), 1)
    _, (gradient,) = case.gradients(lambda x: xp.permute_dims(same(x), (1, 0)), [x], g)
    case.equal(gradient, 2 * g.T, "gradient of a transposed result")
    _, (gradient,) = case.gradients(lambda x: xp.sum(same(x)), [x], np.array(3, np.float32))
    case.equal(gradient, np.full((3, 2), 6, np.float32), "gradient of a sum")


@requirement(
    "CUSTOM-freed",
    "What a custom forward and backward close over is freed with the graph, also if nobody pulls back.",
    port=PORT,
    capabilities=_AUTODIFF,
    needs=("CUSTOM-gradients",),
)
def custom_freed(case: Case) -> None:
    class Held:
        """Something that only the graph keeps alive."""

    def run(pull: bool) -> tuple[weakref.ref[Held], Any]:
        held = Held()

        def backward(residuals: Any, cotangents: Any, needed: Any) -> tuple[Any, ...]:
            return (cotangents[0] if held else None,)

        function = case.platform.custom_vjp(lambda x: (2 * x, ()), backward)
        out, pullback = case.platform.vjp(lambda x: function(x), case.tensor(case.normal((2,), 0)))
        if pull:
            pullback(case.tensor(case.normal((2,), 1)))
        return weakref.ref(held), (out, pullback)

    for pull in (True, False):
        alive, graph = run(pull)
        del graph
        case.is_true(freed(alive), f"still alive after the graph was dropped (pulled back: {pull})")


@requirement(
    "VJP-threads",
    "Several threads of a rank may differentiate at the same time.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(Capability.AUTODIFF, Capability.THREADS),
    needs=("CUSTOM-calls",),
    refusable=False,
)
def vjp_threads(case: Case) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def work(number: int) -> np.ndarray:
        x = case.normal((4,), number)
        _, (gradient,) = case.gradients(lambda x: x * x * number, [x], np.ones(4, np.float32))
        return gradient - 2 * number * x

    with ThreadPoolExecutor(4) as threads:
        for number, error in enumerate(threads.map(work, range(1, 9))):
            case.close(error + 1, np.ones(4), f"gradient of thread job {number}, plus one")
