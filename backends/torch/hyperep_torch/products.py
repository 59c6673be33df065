# SPDX-License-Identifier: Apache-2.0
"""Products of runs of rows, outside autograd: what the differentiable grouped operations are made of.

Two ways to the same result: ``torch.nn.functional.grouped_mm``, where it is native, and a loop over the groups. For
``torch.compile`` and ``torch.export`` the loop is one operator, ``hyperep::rows_product`` or ``columns_product``.
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
        stops = torch.cumsum(group_sizes, 0, dtype=torch.int32)
        if torch.compiler.is_compiling():  # a value cannot be read while a graph is made
            return cls(stops, None, native)
        known = not native or group_sizes.device.type == "cpu"
        sizes = tuple(group_sizes.tolist()) if known else None
        if sizes is not None and sum(sizes) != rows:
            raise ValueError(f"group_sizes={list(sizes)} sum to {sum(sizes)}, but there are {rows} rows")
        return cls(stops, sizes, native)

    @classmethod
    def until(cls, stops: torch.Tensor, rows: int) -> Runs:
        """Runs that end at *stops*, for the loop. Host sync here.

        Raises:
            ValueError: the last one does not end where the *rows* do.
        """
        ends = stops.tolist()
        if ends[-1:] != [rows]:
            raise ValueError(f"groups end at {ends[-1] if ends else 0}, but there are {rows} rows")
        return cls(stops, tuple(end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)), False)

    @property
    def opaque(self) -> bool:
        """Whether a product is one operator for the compiler, which reads the sizes when it is run."""
        return not self.native and self.sizes is None

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
    if runs.opaque:
        return _rows_product(x, weight, runs.stops)
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
    if runs.opaque or (runs.sizes is None and x.device.type == "cpu"):
        return _rows_product_add(total, x, weight, runs.stops)  # rounded once, as without a compiler
    if runs.sizes is None:
        return total.add_(rows_product(x, weight, runs))
    for group, rows in runs.slices():
        total[rows].addmm_(x[rows], weight[group])
    return total


def columns_product(g: torch.Tensor, x: torch.Tensor, runs: Runs) -> torch.Tensor:
    """Each run's columns times its columns: ``[N, A] x [N, B] -> [L, A, B]``; zeros for a group without rows."""
    if runs.opaque:
        return _columns_product(g, x, runs.stops)
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


@torch.library.custom_op("hyperep::rows_product", mutates_args=())
def _rows_product(x: torch.Tensor, weight: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
    return rows_product(x, weight, Runs.until(stops, x.shape[0]))


@_rows_product.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[2]))


@torch.library.custom_op("hyperep::rows_product_add", mutates_args=())
def _rows_product_add(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
    return rows_product_add_(total.clone(), x, weight, Runs.until(stops, x.shape[0]))


@_rows_product_add.register_fake
def _(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(total)


@torch.library.custom_op("hyperep::columns_product", mutates_args=())
def _columns_product(g: torch.Tensor, x: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
    return columns_product(g, x, Runs.until(stops, x.shape[0]))


@_columns_product.register_fake
def _(g: torch.Tensor, x: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
    return x.new_empty((stops.shape[0], g.shape[1], x.shape[1]))


def aligned(x: torch.Tensor) -> torch.Tensor:
    """*x*, copied unless its rows are contiguous and start where the kernel can read them."""
    x = x.contiguous()
    if torch.compiler.is_compiling():  # there is no memory yet, and what a graph allocates is aligned
        return x
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()


def is_turned(weight: torch.Tensor) -> bool:
    """Whether *weight* ``[L, A, B]`` lies in memory as a contiguous ``[L, B, A]``, which the products read as well."""
    turned = weight.transpose(1, 2)
    if weight.is_contiguous() or not turned.is_contiguous():
        return False
    return torch.compiler.is_compiling() or turned.data_ptr() % _ALIGNMENT == 0
