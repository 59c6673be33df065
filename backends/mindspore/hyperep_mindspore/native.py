# SPDX-License-Identifier: Apache-2.0
"""How MindSpore is trained by its own means; what the conformance suite compares with ``vjp``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

__all__ = ["NativeTraining"]


class NativeTraining:
    """``value_and_grad``, ``nn.SGD``, a cell's parameters; see :class:`hyperep.conformance.native.NativeTraining`."""

    def backward(  # noqa: D102
        self,
        function: Callable[..., Any],
        inputs: Sequence[Tensor],
        parameters: Sequence[Parameter],
        cotangent: Tensor,
    ) -> tuple[Tensor, list[Tensor | None]]:
        def weighed(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            output = function(*inputs)
            return ops.sum(output * cotangent), output

        # MindSpore names what is differentiated: inputs by their places, weights by themselves.
        (_, output), found = ms.value_and_grad(
            weighed, tuple(range(len(inputs))), list(parameters) or None, has_aux=True
        )(*inputs)
        of_inputs, of_parameters = found if parameters else (found, ())
        return output, [*(of_inputs if isinstance(of_inputs, tuple) else (of_inputs,)), *of_parameters]

    def step(  # noqa: D102
        self,
        function: Callable[..., Any],
        inputs: Sequence[Tensor],
        parameters: Sequence[Parameter],
        cotangent: Tensor,
        rate: float,
    ) -> None:
        _, gradients = self.backward(function, inputs, parameters, cotangent)
        nn.SGD(list(parameters), learning_rate=rate)(tuple(gradients[len(inputs) :]))

    def save(self, module: nn.Cell) -> dict[str, np.ndarray]:  # noqa: D102
        return {name: np.array(p.asnumpy()) for name, p in module.parameters_dict().items()}

    def load(self, module: nn.Cell, saved: Mapping[str, np.ndarray]) -> None:  # noqa: D102
        ms.load_param_into_net(
            module, {name: Parameter(Tensor(array), name=name) for name, array in saved.items()}, True
        )
