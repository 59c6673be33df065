# SPDX-License-Identifier: Apache-2.0
"""Products of runs of rows, outside autograd: what the differentiable grouped operations are made of.

Two ways to the same result: ``torch.nn.functional.grouped_mm``, where it is native, and a loop over the groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hyperep_torch import kernels

__all__ = [
    "Runs",
    "aligned",
    "columns_product",
    "has_native_kernel",
    "is_aligned",
    "is_turned",
    "rows_product",
    "rows_product_add_",
]

_ALIGNMENT = 16
"""Bytes to which grouped_mm wants its rows aligned."""


def has_native_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether grouped_mm takes *dtype* on *device* without waiting for the device.

    On CUDA PyTorch has a kernel for bfloat16 on compute capability 9.0 and later; whatever else it accepts there, it
    computes by a loop that copies the sizes to the host.
    """
    if not hasattr(F, "grouped_mm"):
        return False
    if device.type == "cpu":
        # torch.compile's model of grouped_mm knows bfloat16 alone, and refuses what the kernel takes.
        return dtype == torch.bfloat16 or (dtype == torch.float32 and not torch.compiler.is_compiling())
    if device.type == "cuda":
        return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (9, 0)
    return False


def is_aligned(dtype: torch.dtype, *widths: int) -> bool:
    """Whether rows of these widths begin where grouped_mm can read them."""
    return not any(width * dtype.itemsize % _ALIGNMENT for width in widths)


@dataclass(frozen=True, slots=True)
class Runs:
    """Which rows belong to which group."""

    stops: torch.Tensor
    """int32 ``[L]`` on the device: where each group ends; what grouped_mm takes."""
    sizes: tuple[int, ...] | None
    """The same on the host, where reading it is free or the loop needs it."""
    native: bool
    """Whether products are grouped_mm's."""

    @classmethod
    def of(cls, group_sizes: torch.Tensor, *, native: bool, rows: int) -> Runs:
        """The runs of *group_sizes*. Host sync here, unless the products are native or the device is the CPU.

        Raises:
            ValueError: the sizes are known on the host, and do not sum to *rows*.
        """
        known = not native or group_sizes.device.type == "cpu"
        sizes = tuple(group_sizes.tolist()) if known else None
        if sizes is not None and sum(sizes) != rows:
            raise ValueError(f"group_sizes={list(sizes)} sum to {sum(sizes)}, but there are {rows} rows")
        return cls(torch.cumsum(group_sizes, 0, dtype=torch.int32), sizes, native)

    def slices(self) -> Iterator[tuple[int, slice]]:
        """Number and rows of each group that has any."""
        assert self.sizes is not None
        start = 0
        for group, size in enumerate(self.sizes):
            if size:
                yield group, slice(start, start + size)
            start += size


def rows_product(x: torch.Tensor, weight: torch.Tensor, runs: Runs) -> torch.Tensor:
    """Each run times its own matrix: ``[N, A] x [L, A, B] -> [N, B]``."""
    if not x.shape[0]:
        return x.new_empty((0, weight.shape[2]))
    if runs.native:
        return F.grouped_mm(x, weight, offs=runs.stops)
    output = x.new_empty((x.shape[0], weight.shape[2]))
    for group, rows in runs.slices():
        torch.mm(x[rows], weight[group], out=output[rows])
    return output


def rows_product_add_(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, runs: Runs) -> torch.Tensor:
    """Add :func:`rows_product` to *total*, in place; without a buffer of its own where the sizes are on the host."""
    if runs.sizes is None:
        return total.add_(rows_product(x, weight, runs))
    for group, rows in runs.slices():
        total[rows].addmm_(x[rows], weight[group])
    return total


def columns_product(g: torch.Tensor, x: torch.Tensor, runs: Runs) -> torch.Tensor:
    """Each run's columns times its columns: ``[N, A] x [N, B] -> [L, A, B]``; zeros for a group without rows."""
    shape = (runs.stops.shape[0], g.shape[1], x.shape[1])
    if not x.shape[0]:
        return x.new_zeros(shape)
    if runs.native:
        product = F.grouped_mm(g.t(), x, offs=runs.stops)
        # Some kernels leave the product of a group without rows uninitialised, and it may be NaN.
        if kernels.usable(product):
            kernels.load().clear_empty_groups_(product, runs.stops)
        elif product.device.type != "cpu":
            empty = torch.diff(runs.stops, prepend=runs.stops.new_zeros(1)) == 0
            product.masked_fill_(empty[:, None, None], 0)
        return product
    product = x.new_zeros(shape)  # zeros, because groups without rows are not visited
    for group, rows in runs.slices():
        torch.mm(g[rows].t(), x[rows], out=product[group])
    return product


def aligned(x: torch.Tensor) -> torch.Tensor:
    """*x*, copied unless its rows are contiguous and start where the kernel can read them."""
    x = x.contiguous()
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()


def is_turned(weight: torch.Tensor) -> bool:
    """Whether *weight* ``[L, A, B]`` lies in memory as a contiguous ``[L, B, A]``, which the products read as well."""
    turned = weight.transpose(1, 2)
    return not weight.is_contiguous() and turned.is_contiguous() and turned.data_ptr() % _ALIGNMENT == 0
