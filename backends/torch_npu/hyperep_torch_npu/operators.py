# SPDX-License-Identifier: Apache-2.0
"""The operators that torch_npu adds to PyTorch and that this package calls: each one's schema, and what it takes.

A call outside their limits goes to an ordinary operator of PyTorch instead. The limits are those of torch_npu's
documentation, and where that says less than the operator of CANN below it can do, of CANN's page of that operator:

* ``npu_grouped_matmul`` is ``aclnnGroupedMatmulV4`` or ``V5``. Both pages, ``aclnnGroupedMatmulV4.md`` and that of
  ``V5``, have groups in the contracted dim, ``group_type`` 2, for one x, transposed, one weight, not transposed, and
  one result, in float16, bfloat16 and float32; torch_npu's own text stops at the groups of rows.
* ``npu_moe_token_unpermute`` is ``aclnnMoeTokenUnpermute``, whose page lists bfloat16, float16 and float32, with
  indices of int32, none of them twice; torch_npu's own text lists bfloat16.
"""

from __future__ import annotations

import torch

__all__ = ["SCHEMAS", "grouped_columns_product", "grouped_rows_product", "take_rows", "takes_groups", "takes_rows"]

SCHEMAS = {
    "npu_grouped_matmul": "npu::npu_grouped_matmul(Tensor[] x, Tensor[] weight, *, Tensor[]? bias=None, "
    "Tensor[]? scale=None, Tensor[]? offset=None, Tensor[]? antiquant_scale=None, Tensor[]? antiquant_offset=None, "
    "Tensor[]? per_token_scale=None, Tensor? group_list=None, Tensor[]? activation_input=None, "
    "Tensor[]? activation_quant_scale=None, Tensor[]? activation_quant_offset=None, int? split_item=0, "
    "int? group_type=None, int? group_list_type=0, int? act_type=0, int[]? tuning_config=None, int? output_dtype=None, "
    "int? x_dtype=None, int? weight_dtype=None, int? scale_dtype=None, int? per_token_scale_dtype=None) -> Tensor[]",
    "npu_moe_token_unpermute": "npu::npu_moe_token_unpermute(Tensor permuted_tokens, Tensor sorted_indices, "
    "Tensor? probs=None, bool padded_mode=False, int[]? restore_shape=None) -> Tensor",
}
"""Of the torch_npu that this package is tested with; a test compares them with the installed one's."""

_ONE_RESULT = 3
_ROWS_IN_GROUPS, _CONTRACTED_IN_GROUPS = 0, 2
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_STOPS = 0  # a list of group sizes would be 1, but that excludes a single group
_WIDTH_LIMIT = 65536
_GROUP_LIMIT = 1024
_INDEX_LIMIT = 16777215


def takes_groups(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether npu_grouped_matmul takes rows ``[N, D]`` and matrices ``[L, H, D]``, and what their gradients need."""
    return (
        x.dtype in _FLOATS
        and max(x.shape[1], weight.shape[1]) < _WIDTH_LIMIT
        and 0 < weight.shape[0] <= _GROUP_LIMIT
        and x.numel() > 0
        and weight.numel() > 0
    )


def grouped_rows_product(x: torch.Tensor, weight: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
    """Each run of rows times its own matrix: ``[N, A] x [L, A, B] -> [N, B]``; stops are int64 ``[L]``."""
    return _grouped(x.contiguous(), weight, stops, _ROWS_IN_GROUPS)


def grouped_columns_product(g: torch.Tensor, x: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
    """Each run's columns times its columns: ``[N, A] x [N, B] -> [L, A, B]``; zeros for a group without rows."""
    product = _grouped(g.contiguous().t(), x.contiguous(), stops, _CONTRACTED_IN_GROUPS)
    # The operator does not say what it leaves in the product of a group without rows; it may be NaN.
    empty = torch.diff(stops, prepend=stops.new_zeros(1)) == 0
    return product.masked_fill_(empty[:, None, None], 0)


def _grouped(x: torch.Tensor, weight: torch.Tensor, stops: torch.Tensor, group_type: int) -> torch.Tensor:
    (product,) = torch.ops.npu.npu_grouped_matmul(
        [x], [weight], group_list=stops, split_item=_ONE_RESULT, group_type=group_type, group_list_type=_STOPS
    )
    return product


def takes_rows(x: torch.Tensor) -> bool:
    """Whether npu_moe_token_unpermute takes these rows."""
    return x.dtype in _FLOATS and x.ndim == 2 and x.numel() > 0 and x.shape[0] < _INDEX_LIMIT


def take_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``x[index]`` for a permutation of rows ``[N, D]``, outside autograd.

    Without probabilities, putting tokens back where they came from is a gather: row ``index[i]`` goes to place ``i``.
    npu_moe_token_permute is no way to do the same, because it sorts its indices first, and they are sorted already.
    """
    return torch.ops.npu.npu_moe_token_unpermute(x.detach(), index.to(torch.int32))
