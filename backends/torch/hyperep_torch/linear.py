# SPDX-License-Identifier: Apache-2.0
"""The forward of ``nn.Linear`` where a style has sliced its weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["linear_forward"]


def linear_forward(
    module: nn.Linear, x: torch.Tensor, *, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """What *module* computes; *reduce* is applied to the product, before the bias is added once."""
    if reduce is None or module.bias is None:
        product = F.linear(x, module.weight, module.bias)
        return product if reduce is None else reduce(product)
    return reduce(F.linear(x, module.weight)) + module.bias
