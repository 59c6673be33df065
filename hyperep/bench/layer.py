# SPDX-License-Identifier: Apache-2.0
"""One way of the routed layer, from tokens to tokens: experts under a style, and the shared experts beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hyperep.bench.data import Data
from hyperep.mesh import DeviceMesh
from hyperep.moe.experts import TAKES, experts_forward
from hyperep.styles import ParallelStyle

__all__ = ["Layer"]


class Layer:
    """The layer of *data* with a style applied; *function* in its place computes the same from the same parameters."""

    def __init__(
        self, data: Data, mesh: DeviceMesh, style: ParallelStyle, function: Callable[..., Any] | None = None
    ) -> None:
        self.data, self.platform = data, mesh.platform
        self.experts = self._experts()
        style.apply(self.experts, mesh)
        self.parameters = self.platform.parameters(self.experts)
        self._routed = function or self.experts
        self._shared = data.shared_weights() if data.shape.shared else None

    def forward(self) -> Any:
        """The result."""
        return self._call(self.data.tokens, self.data.weights)

    def forward_recorded(self) -> Callable[[], Any]:
        """Forward, for a backward to follow; calling the result is the backward."""
        data = self.data
        _, pullback = self.platform.vjp(
            self._call, data.tokens, data.weights, parameters=list(self.parameters.values())
        )
        return lambda: pullback(data.cotangent)

    def forward_backward(self) -> Any:
        """Gradients of the tokens, of their weights, and of the parameters."""
        return self.forward_recorded()()

    def local_parameters(self) -> dict[str, Any]:
        """This rank's part of each parameter."""
        return {name: self.platform.local(parameter) for name, parameter in self.parameters.items()}

    def _call(self, tokens: Any, weights: Any) -> Any:
        out = self._routed(tokens, self.data.choices, weights, rows=self.data.rows)
        if self._shared is None:
            return out
        return out + self.platform.grouped_swiglu(tokens, *self._shared)

    def _experts(self) -> Any:
        """A module as ``hyperep.moe.GroupedExperts`` makes it, in the shape's dtype."""
        platform, num_experts = self.platform, self.data.shape.experts

        def forward(m: Any, x: Any, *routing: Any, rows: int | None = None) -> Any:
            return experts_forward(platform, num_experts, m, x, *routing, rows=rows)

        module = platform.make_module("GroupedExperts", self.data.expert_weights(), forward)
        module.takes = TAKES
        return module
