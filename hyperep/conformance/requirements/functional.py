# SPDX-License-Identifier: Apache-2.0
"""Modules that are called with other tensors in place of their parameters."""

from __future__ import annotations

from typing import Any

import numpy as np

from hyperep.conformance.case import Case
from hyperep.conformance.requirement import Level, requirement
from hyperep.platform.capabilities import Capability

PORT = "modules"
_TRAINED = (Capability.AUTODIFF, Capability.MODULES)


def _module(case: Case) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """``outer * x * inner + bias``, with a module below it, and what its parameters are."""
    outer, inner, bias = (case.normal((3,), n) for n in (1, 2, 3))
    platform = case.platform
    below = platform.make_module("Below", {"w": case.tensor(inner)}, lambda m, x: x * m.w)
    values = {"w": case.tensor(outer), "bias": case.tensor(bias)}
    module = platform.make_module("Above", values, lambda m, x: m.w * m.below(x) + m.bias, children={"below": below})
    return module, outer, inner, bias


@requirement(
    "MOD-functional-call",
    "functional_call gives a module other tensors in place of its parameters, also of another shape and below it, and "
    "gradients flow through them; afterwards, and after an error, it has its own.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(*_TRAINED, Capability.FUNCTIONAL_CALL),
    needs=("MOD-local-gradients",),
)
def functional_call(case: Case) -> None:
    module, outer, inner, bias = _module(case)
    platform, x, g = case.platform, case.normal((2, 3), 4), case.normal((2, 3), 5)
    wider, below = case.normal((2, 3), 6), case.normal((1, 3), 7)
    handles = platform.parameters(module)

    def both(x: Any, wider: Any, below: Any) -> Any:
        given = {"w": wider, "below.w": below * platform.local(handles["below.w"])}
        return platform.functional_call(module, given, module, x) + module(x)

    out, (gx, g_wider, g_below, g_w, g_inner, g_bias) = case.gradients(
        both, [x, wider, below], g, [handles["w"], handles["below.w"], handles["bias"]]
    )
    scaled = below * inner
    case.close(out, wider * x * scaled + bias + outer * x * inner + bias, "output")
    case.close(gx, g * (wider * scaled + outer * inner), "gradient of the input")
    case.close(g_wider, g * x * scaled, "gradient of what stood for the parameter")
    case.close(g_below, (g * wider * x * inner).sum(axis=0, keepdims=True), "gradient of what stood for one below")
    case.close(g_w, (g * x * inner).sum(axis=0), "gradient of the module's own parameter")
    case.close(g_inner, (g * (wider * x * below + outer * x)).sum(axis=0), "gradient of the parameter below")
    case.close(g_bias, 2 * g.sum(axis=0), "gradient of a parameter that was left out")

    def failing(x: Any) -> Any:
        raise KeyError("of the function")

    case.raises(KeyError, lambda: platform.functional_call(module, {"w": case.tensor(wider)}, failing, case.tensor(x)))
    case.close(module(case.tensor(x)), outer * x * inner + bias, "the module afterwards")
