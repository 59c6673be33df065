# SPDX-License-Identifier: Apache-2.0
"""``vjp`` inside of a custom forward, and its pullback inside of the backward: how a schedule computes its parts."""

from __future__ import annotations

from typing import Any

import numpy as np

from hyperep.conformance.case import Case
from hyperep.conformance.requirement import requirement
from hyperep.platform.capabilities import Capability

PORT = "autodiff"


@requirement(
    "VJP-in-custom-forward",
    "A custom forward may call vjp, on parameters that an enclosing vjp differentiates too, and its backward the "
    "pullbacks.",
    port=PORT,
    capabilities=(Capability.AUTODIFF,),
    needs=("CUSTOM-calls", "MOD-gradients"),
)
def vjp_in_custom_forward(case: Case) -> None:
    x, w, g = case.normal((4, 3), 0), case.normal((3, 3), 1) / 2, case.normal((4, 3), 2)
    platform, xp = case.platform, case.xp
    module = platform.make_module("Product", {"w": case.tensor(w)}, lambda m, x: xp.exp(x @ m.w))
    parameters = list(platform.parameters(module).values())

    def in_parts(x: Any) -> Any:
        """The module, called for two parts of the rows."""
        pullbacks: list[Any] = []

        def forward(x: Any, w: Any) -> tuple[Any, tuple[Any, ...]]:
            done = [platform.vjp(module, part, parameters=parameters) for part in (x[:1], x[1:])]
            pullbacks[:] = [pullback for _, pullback in done]
            return xp.concat([out for out, _ in done], axis=0), ()

        def backward(residuals: Any, cotangents: Any, needed: Any) -> tuple[Any, ...]:
            # The last part first, as graphs are.
            rest_x, rest_w = pullbacks[1](cotangents[0][1:])
            first_x, first_w = pullbacks[0](cotangents[0][:1])
            return xp.concat([first_x, rest_x], axis=0), first_w + rest_w

        return platform.custom_vjp(forward, backward)(x, *map(platform.local, parameters))

    def product(x: np.ndarray) -> np.ndarray:
        return np.exp(x @ w)

    # Once more before and after, so that parameters which the inner vjp leaves unbound are seen.
    first = product(x)
    second = product(first / 8)
    third = product(second / 8)
    out, (gx, gw) = case.gradients(lambda x: module(in_parts(module(x) / 8) / 8), [x], g, parameters)
    case.close(out, third, "output")
    g3 = g * third
    g2 = (g3 @ w.T) / 8 * second
    g1 = (g2 @ w.T) / 8 * first
    case.close(gx, g1 @ w.T, "gradient of the input", 1e-4)
    case.close(gw, x.T @ g1 + (first / 8).T @ g2 + (second / 8).T @ g3, "gradient of the parameter", 1e-4)


@requirement(
    "VJP-in-vjp",
    "vjp may be called in a function that is differentiated: its outputs and gradients are right, also where the inner "
    "function reads a tensor of the outer one, and are constants to the outer one, whose own gradients are whole.",
    port=PORT,
    capabilities=(Capability.AUTODIFF,),
    needs=("VJP-several-outputs", "CUSTOM-calls", "STOP-gradient"),
)
def vjp_in_vjp(case: Case) -> None:
    platform, xp = case.platform, case.xp
    square = platform.custom_vjp(lambda x: (x * x, (x,)), lambda residuals, c, needed: (2 * residuals[0] * c[0],))
    x, y, g, h = (case.normal((3, 2), n) for n in range(4))
    seen: list[Any] = []

    def outer(x: Any, y: Any) -> Any:
        between = 3 * x
        # Of primals that the outer one traces, closing over others that it traces, and through a custom function.
        out, pullback = platform.vjp(lambda a, b: square(a) * b * between + y, between, case.tensor(h))
        first = pullback(xp.exp(between))
        second = platform.vjp(lambda a: a * y, x)[1](case.tensor(g))
        seen.extend(case.host(t) for t in (out, *first, *second))
        # What is made of constants adds to the output and to no gradient.
        return square(between) * y + out * first[0] + second[0]

    out, (gx, gy) = case.gradients(outer, [x, y], g)
    t, c = 3 * x, np.exp(3 * x)
    wanted = (t * t * h * t + y, c * 2 * t * h * t, c * t * t * t, g * y)
    for n, (got, want) in enumerate(zip(seen, wanted, strict=True)):
        case.close(got, want, ("output of the inner one", "gradient", "second gradient", "gradient of the next")[n])
    case.close(out, t * t * y + wanted[0] * wanted[1] + wanted[3], "output of the outer one")
    case.close(gx, g * 2 * t * y * 3, "gradient of the first primal of the outer one")
    case.close(gy, g * t * t, "gradient of the second primal of the outer one")


@requirement(
    "VJP-in-custom-backward",
    "A custom backward may evaluate and pull back a vjp, of a function that reads other tensors and parameters, also "
    "where several are under way.",
    port=PORT,
    capabilities=(Capability.AUTODIFF, Capability.MODULES),
    needs=("VJP-in-custom-forward", "VJP-in-vjp"),
)
def vjp_in_custom_backward(case: Case) -> None:
    x, w, g = case.normal((4, 3), 0), case.normal((3, 3), 1) / 2, case.normal((4, 3), 2)
    platform, xp = case.platform, case.xp
    module = platform.make_module("Product", {"w": case.tensor(w)}, lambda m, x: xp.exp(x @ m.w))
    parameters = list(platform.parameters(module).values())
    scale = case.tensor(np.full((4, 3), 2, np.float32))

    def recomputed(x: Any) -> Any:
        def forward(x: Any, w: Any) -> tuple[Any, tuple[Any, ...]]:
            return module(scale * x), (x,)

        def backward(residuals: Any, cotangents: Any, needed: Any) -> tuple[Any, ...]:
            _, pullback = platform.vjp(lambda x: module(scale * x), residuals[0], parameters=parameters)
            # Another one is recorded before the first one is pulled back.
            _, other = platform.vjp(lambda x: xp.exp(module(x)), residuals[0], parameters=parameters)
            found = pullback(cotangents[0])
            other(cotangents[0])
            return found

        return platform.custom_vjp(forward, backward)(x, *map(platform.local, parameters))

    out, (gx, gw) = case.gradients(lambda x: recomputed(recomputed(x) / 9) + module(x), [x], g, parameters)
    first = np.exp(2 * x @ w)
    second, plain = np.exp(2 * first / 9 @ w), np.exp(x @ w)
    g2, g0 = g * second, g * plain
    g1 = 2 * (g2 @ w.T) / 9 * first
    case.close(out, second + plain, "output", 1e-4)
    case.close(gx, 2 * (g1 @ w.T) + g0 @ w.T, "gradient of the input", 1e-4)
    case.close(gw, 2 * (x.T @ g1) + 2 * (first / 9).T @ g2 + x.T @ g0, "gradient of the parameter", 1e-4)


@requirement(
    "VJP-parameters-not-asked",
    "Parameters that were not asked for are constants, of which nothing is left behind; those that were asked for have "
    "their gradients in that order, whichever others the function reads.",
    port=PORT,
    capabilities=(Capability.AUTODIFF, Capability.MODULES),
    needs=("MOD-gradients", "MOD-unused-parameter"),
)
def not_asked(case: Case) -> None:
    platform = case.platform
    tensors = {name: case.normal((3,), n) for n, name in enumerate("abc")}
    x, g = case.normal((3,), 4), case.normal((3,), 5)
    module = platform.make_module(
        "Three", {name: case.tensor(t) for name, t in tensors.items()}, lambda m, x: m.a * m.b * x + m.c
    )
    handles = platform.parameters(module)
    a, b = tensors["a"], tensors["b"]
    wanted = {"a": g * b * x, "b": g * a * x, "c": g}
    # Several times, as gradients that are kept from one call would be added to those of the next.
    for asked in ("", "a", "cb", "", "abc", "b", "ca"):
        case.note(asked=asked)
        _, (gx, *gradients) = case.gradients(module, [x], g, [handles[name] for name in asked])
        case.close(gx, g * a * b, "gradient of the input")
        for name, gradient in zip(asked, gradients, strict=True):
            case.close(gradient, wanted[name], f"gradient of {name}")
        _, gradients = case.gradients(lambda: module(case.tensor(x)), [], g, [handles[name] for name in asked])
        for name, gradient in zip(asked, gradients, strict=True):
            case.close(gradient, wanted[name], f"gradient of {name}, where nothing else is asked for")


@requirement(
    "VJP-same-primal-twice",
    "A tensor that is given as two primals counts as two: each has its own gradient.",
    port=PORT,
    capabilities=(Capability.AUTODIFF,),
    needs=("VJP-gradients",),
)
def same_twice(case: Case) -> None:
    x, g = case.normal((3,), 0), case.normal((3,), 1)
    tensor = case.tensor(x)
    _, pullback = case.platform.vjp(lambda a, b: a * a * b, tensor, tensor)
    first, second = pullback(case.tensor(g))
    case.close(first, 2 * x * x * g, "gradient of the first")
    case.close(second, x * x * g, "gradient of the second")
