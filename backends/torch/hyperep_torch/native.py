# SPDX-License-Identifier: Apache-2.0
"""How PyTorch is trained by its own means; what the conformance suite compares with ``vjp``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hyperep_torch.local_parts import local_part

__all__ = ["NativeTraining"]


class NativeTraining:
    """``backward()``, ``torch.optim.SGD``, ``state_dict``; see :class:`hyperep.conformance.native.NativeTraining`."""

    def backward(  # noqa: D102
        self,
        function: Callable[..., Any],
        inputs: Sequence[torch.Tensor],
        parameters: Sequence[nn.Parameter],
        cotangent: torch.Tensor,
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        for parameter in parameters:
            parameter.grad = None
        output = function(*leaves)
        output.backward(cotangent)
        gradients = [None if x.grad is None else local_part(x.grad) for x in (*leaves, *parameters)]
        for parameter in parameters:
            parameter.grad = None
        return output.detach(), gradients

    def step(  # noqa: D102
        self,
        function: Callable[..., Any],
        inputs: Sequence[torch.Tensor],
        parameters: Sequence[nn.Parameter],
        cotangent: torch.Tensor,
        rate: float,
    ) -> None:
        # DTensors and tensors do not go through one kernel together.
        optimizer = torch.optim.SGD(parameters, lr=rate, foreach=False)
        optimizer.zero_grad()
        function(*inputs).backward(cotangent)
        optimizer.step()
        optimizer.zero_grad()

    def save(self, module: nn.Module) -> dict[str, np.ndarray]:  # noqa: D102
        return {name: local_part(x).detach().cpu().numpy().copy() for name, x in module.state_dict().items()}

    def load(self, module: nn.Module, saved: Mapping[str, np.ndarray]) -> None:  # noqa: D102
        held = module.state_dict()
        state = {name: torch.from_numpy(np.array(array)).to(held[name].device) for name, array in saved.items()}
        for name, tensor in state.items():
            if isinstance(held[name], DTensor):
                layout = held[name]
                state[name] = DTensor.from_local(tensor, layout.device_mesh, layout.placements, run_check=False)
        module.load_state_dict(state)
