# SPDX-License-Identifier: Apache-2.0
"""Initial weights, drawn in place."""

from __future__ import annotations

import math

import torch
from torch import nn

__all__ = ["uniform_fan_in_"]


def uniform_fan_in_(weight: torch.Tensor) -> None:
    """Uniform in ``+-1/sqrt(fan_in)``, where the last dim is the input: what ``nn.Linear`` does."""
    bound = 1 / math.sqrt(weight.shape[-1])
    nn.init.uniform_(weight, -bound, bound)
