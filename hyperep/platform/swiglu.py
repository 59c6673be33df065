# SPDX-License-Identifier: Apache-2.0
"""SwiGLU between two matrix products, from members that every platform has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyperep.platform.protocol import Platform

__all__ = ["sigmoid", "swiglu"]


def swiglu(platform: Platform[Any], gate: Any, up: Any) -> Any:
    """``silu(gate) * up``, elementwise (arXiv:2002.05202); keeps the two inputs for backward and nothing else.

    Left to a tape, the same line would keep every intermediate result, each as large as the inputs.
    """

    def forward(gate: Any, up: Any) -> tuple[Any, tuple[Any, ...]]:
        return gate * sigmoid(platform, gate) * up, (gate, up)

    def backward(residuals: Any, cotangents: Any, needed: tuple[bool, ...]) -> tuple[Any, ...]:
        (gate, up), (g,) = residuals, cotangents
        slope = sigmoid(platform, gate)
        # d silu(z) / dz = s + z * s * (1 - s), where s is the sigmoid of z.
        grad_gate = g * up * slope * (1.0 + gate * (1.0 - slope)) if needed[0] else None
        return grad_gate, g * gate * slope if needed[1] else None

    return platform.custom_vjp(forward, backward)(gate, up)


def sigmoid(platform: Platform[Any], x: Any) -> Any:
    """The logistic function, by tanh, which overflows nowhere."""
    return 0.5 * platform.xp.tanh(0.5 * x) + 0.5
