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
