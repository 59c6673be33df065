# SPDX-License-Identifier: Apache-2.0
"""Products of groups by CANN's grouped product, for Ascend: the sizes of groups stay on the device.

``aclnnGroupedMatmulV4`` is reached by MindSpore's ``grouped_matmul_v4``. MindSpore documents it for groups of rows
(``group_type`` 0), whose derivative it has; its own derivative of the weights is the same operator with the contracted
dim in groups (2), which the page ``aclnnGroupedMatmulV4.md`` of CANN has for one x, one weight and one out, of float16,
bfloat16 or float32. What that page excludes, or does not speak of, goes by loops of ordinary products.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mindspore as ms
from mindspore import Tensor, mint, ops

from hyperep_mindspore.private_names import grouped_product
from hyperep_mindspore.products import BY_MINDSPORE, Runs, product_by_run, products_of_runs, read_runs

__all__ = ["BY_CANN", "Groups"]

_ONE_RESULT = 3
_ROWS_IN_GROUPS, _CONTRACTED_IN_GROUPS = 0, 2
_STOPS = 0
_WIDTH_LIMIT = 65536
_GROUP_LIMIT = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """Runs of rows, described on the device."""

    sizes: Tensor
    """int64 ``[L]``."""
    stops: Tensor
    """int64 ``[L]``: where each run ends."""
    rows: int
    """``N``, the sum of the sizes."""

    @staticmethod
    def of(group_sizes: Tensor, rows: int) -> Groups:
        """The groups of *rows* rows. Whether the sizes sum to that only the host could tell."""
        sizes = ops.cast(group_sizes, ms.int64)
        stops = mint.cumsum(sizes, 0) if sizes.shape[0] else sizes
        return Groups(sizes=sizes, stops=stops, rows=rows)

    def read(self) -> Runs:
        """The same on the host, for a loop."""
        return read_runs(self.sizes, self.rows)


def _by_run(rows: Tensor, weight: Tensor, groups: Groups, *, transpose: bool) -> Tensor:
    width = weight.shape[1] if transpose else weight.shape[2]
    if not rows.size or not weight.size:
        return ops.zeros((rows.shape[0], width), rows.dtype)
    if weight.shape[0] == 1:
        # Some of CANN's documents forbid a list of one group, and nothing is grouped then.
        return ops.matmul(rows, weight[0].T if transpose else weight[0])
    if not _takes(weight):
        return product_by_run(rows, weight, groups.read(), transpose=transpose)
    matrices = mint.transpose(weight.contiguous(), 1, 2) if transpose else weight.contiguous()  # a view: no copy
    return _product(rows.contiguous(), matrices, groups, _ROWS_IN_GROUPS)


def _outer(g: Tensor, x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    if not g.size or not x.size:
        return ops.zeros(weight.shape, weight.dtype)
    if weight.shape[0] == 1:
        return ops.expand_dims(ops.matmul(g.T, x), 0)
    if not _takes(weight):
        return products_of_runs(g, x, weight, groups.read())
    product = _product(mint.transpose(g.contiguous(), 0, 1), x.contiguous(), groups, _CONTRACTED_IN_GROUPS)
    # CANN does not say what is left in the product of a group without rows; it may be NaN.
    some = ops.reshape(groups.sizes != 0, (-1, 1, 1))
    return ops.where(some, product, ops.zeros((1, 1, 1), product.dtype))


def _takes(weight: Tensor) -> bool:
    return weight.shape[0] <= _GROUP_LIMIT and max(weight.shape[1:]) < _WIDTH_LIMIT


def _product(x: Tensor, weight: Tensor, groups: Groups, group_type: int) -> Tensor:
    (product,) = grouped_product(
        [x],
        [weight],
        group_list=groups.stops,
        split_item=_ONE_RESULT,
        group_type=group_type,
        group_list_type=_STOPS,
    )
    return product


BY_CANN = replace(BY_MINDSPORE, groups=Groups.of, by_run=_by_run, outer=_outer)
