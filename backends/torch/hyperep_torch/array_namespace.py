# SPDX-License-Identifier: Apache-2.0
"""``ArrayNamespace``: the Array API standard on torch, bound to a device.

The functions are array-api-compat's. Creation functions get the device as their default. A few that the way of a
token calls often, or that would wait for the device, are replaced by cheaper ones of the same meaning.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import array_api_compat.torch as compat
import torch

from hyperep_torch import kernels

__all__ = ["ArrayNamespace"]


class ArrayNamespace:
    """The namespace; everything that is not defined here is looked up in ``array_api_compat.torch``."""

    bool = torch.bool
    int32 = torch.int32
    int64 = torch.int64
    float16 = torch.float16
    bfloat16 = torch.bfloat16
    float32 = torch.float32
    float64 = torch.float64

    def __init__(self, device: torch.device) -> None:
        self.device = device
        for name in ("arange", "empty", "full", "ones", "zeros"):
            setattr(self, name, functools.partial(getattr(compat, name), device=device))
        self.maximum = _with_scalars(torch.maximum)
        self.minimum = _with_scalars(torch.minimum)

    def __getattr__(self, name: str) -> Any:
        value = getattr(compat, name)
        self.__dict__[name] = value  # found at once from the next time on, as each step of a layer asks for some
        return value

    def matmul(self, x1: torch.Tensor, x2: torch.Tensor, /) -> torch.Tensor:
        """Matrix product in the dtype of its factors, also under autocast: the standard's result dtypes know of none.

        Routers rely on it. The operator ``@`` is narrowed by autocast as everywhere in PyTorch.
        """
        if not torch.is_autocast_enabled(self.device.type):
            return torch.matmul(x1, x2)
        with torch.autocast(self.device.type, enabled=False):
            return torch.matmul(x1, x2)

    @staticmethod
    def take(x: torch.Tensor, indices: torch.Tensor, /, *, axis: int = 0) -> torch.Tensor:
        """Gather along *axis* by non-negative one-dimensional *indices*."""
        if axis == 0 and x.ndim > 1 and kernels.usable(x) and not (x.requires_grad and torch.is_grad_enabled()):
            return kernels.load().gather_rows(x.contiguous(), indices)
        return torch.index_select(x, axis, indices)

    @staticmethod
    def take_along_axis(x: torch.Tensor, indices: torch.Tensor, /, *, axis: int = -1) -> torch.Tensor:
        """Gather along *axis* by non-negative *indices* of the same number of dims."""
        indices, along = indices.to(torch.int64), axis % x.ndim
        if all(a == b for dim, (a, b) in enumerate(zip(x.shape, indices.shape, strict=True)) if dim != along):
            return torch.gather(x, along, indices)  # take_along_dim makes a compiler take sizes for constants
        return torch.take_along_dim(x, indices, dim=along)

    @staticmethod
    def cumulative_sum(
        x: torch.Tensor,
        /,
        *,
        axis: int | None = None,
        dtype: torch.dtype | None = None,
        include_initial: bool = False,
    ) -> torch.Tensor:
        """Running sum along *axis*, which may be left out for one dim; integers are summed in int64."""
        if axis is None:
            if x.ndim != 1:
                raise ValueError(f"cumulative_sum of {x.ndim} dims needs an axis")
            axis = 0
        total = torch.cumsum(x, axis, dtype=dtype)
        if not include_initial:
            return total
        shape = list(total.shape)
        shape[axis] = 1
        return torch.cat([total.new_zeros(shape), total], dim=axis)

    def __repr__(self) -> str:
        return f"ArrayNamespace(torch, {self.device})"


def _with_scalars(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Let *function* take a Python scalar on either side; it is filled in on the device, with no copy from the host."""

    @functools.wraps(function)
    def binary(x1: Any, x2: Any, /) -> torch.Tensor:
        if not isinstance(x1, torch.Tensor):
            x1 = torch.full((), x1, dtype=x2.dtype, device=x2.device)
        if not isinstance(x2, torch.Tensor):
            x2 = torch.full((), x2, dtype=x1.dtype, device=x1.device)
        return function(x1, x2)

    return binary
