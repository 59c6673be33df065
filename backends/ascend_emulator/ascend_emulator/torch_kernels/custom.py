# SPDX-License-Identifier: Apache-2.0
"""CPU kernels of operators that torch_npu adds: grouped matrix products, the permutation of tokens, casts.

They follow the contracts that the wheel documents (`help(torch_npu.npu_grouped_matmul)`) and, where the wheel says
less, CANN's pages of the operators below (`aclnnGroupedMatmulV4.md`, `aclnnMoeTokenUnpermute.md`), and refuse what
those exclude, so that a caller who relies on more is told. What a contract leaves undefined is NaN here, so that a
caller who reads it sees that too. `SCHEMAS` is what these were written for, and `serve` refuses a wheel that has
others.
"""

from collections.abc import Sequence
from typing import Any

import torch

SCHEMAS = {
    "_npu_dtype_cast": "npu::_npu_dtype_cast(Tensor input, ScalarType dtype) -> Tensor",
    "npu_grouped_matmul": "npu::npu_grouped_matmul(Tensor[] x, Tensor[] weight, *, Tensor[]? bias=None, "
    "Tensor[]? scale=None, Tensor[]? offset=None, Tensor[]? antiquant_scale=None, Tensor[]? antiquant_offset=None, "
    "Tensor[]? per_token_scale=None, Tensor? group_list=None, Tensor[]? activation_input=None, "
    "Tensor[]? activation_quant_scale=None, Tensor[]? activation_quant_offset=None, int? split_item=0, "
    "int? group_type=None, int? group_list_type=0, int? act_type=0, int[]? tuning_config=None, int? output_dtype=None, "
    "int? x_dtype=None, int? weight_dtype=None, int? scale_dtype=None, int? per_token_scale_dtype=None) -> Tensor[]",
    "npu_moe_token_permute": "npu::npu_moe_token_permute(Tensor tokens, Tensor indices, int? num_out_tokens=None, "
    "bool padded_mode=False) -> (Tensor, Tensor)",
    "npu_moe_token_permute_grad_v2": "npu::npu_moe_token_permute_grad_v2(Tensor grad_permuted_tokens, "
    "Tensor sorted_indices, SymInt tokens_size_0, ScalarType tokens_dtype, SymInt num_topK, bool padded_mode=False) "
    "-> Tensor",
    "_npu_moe_token_unpermute": "npu::_npu_moe_token_unpermute(Tensor permuted_tokens, Tensor sorted_indices, "
    "Tensor? probs=None, bool padded_mode=False, int[]? restore_shape=None) -> "
    "(Tensor unpermuted_tokens, Tensor permuted_tokens_for_backward)",
    "npu_moe_token_unpermute_grad_v2": "npu::npu_moe_token_unpermute_grad_v2(Tensor grad_unpermuted_tokens, "
    "Tensor sorted_indices, SymInt permuted_tokens_size_0, ScalarType permuted_tokens_dtype, Tensor? probs=None, "
    "bool padded_mode=False, int[]? restore_shape=None, Tensor? permuted_tokens=None) -> (Tensor, Tensor)",
}

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INNER_LIMIT = 65536
MOST_INDICES = 16777215


def check_schemas() -> None:
    """Refuse a wheel whose operators are not the ones that the kernels here stand in for.

    Raises:
        RuntimeError: an operator is missing or has another schema; the message holds both.
    """
    for name, expected in SCHEMAS.items():
        packet = getattr(torch.ops.npu, name, None)
        found = None if packet is None else str(packet.default._schema)
        if found != expected:
            raise RuntimeError(
                f"this torch_npu has another {name} than the emulator's: it has {found}, expected {expected}; "
                f"adapt ascend_emulator/torch_kernels/custom.py to the new contract"
            )


def require(rule: bool, operator: str, message: str) -> None:
    """Refuse a call that the operator's contract excludes."""
    if not rule:
        raise RuntimeError(f"emulated {operator}: {message}")


def npu_dtype_cast(input: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values as another type; torch_npu's own collectives use it for types that HCCL does not know."""
    return input.to(dtype)


def npu_grouped_matmul(
    x: Sequence[torch.Tensor],
    weight: Sequence[torch.Tensor],
    *,
    group_list: torch.Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    **others: Any,
) -> list[torch.Tensor]:
    """One tensor of each kind, rows (`group_type` 0) or the contracted dimension (2) in groups.

    group_type 0: x ``[N, K]``, weight ``[G, K, M]`` -> ``[N, M]``.
    group_type 2: x ``[K, N]`` (the transposed view of a contiguous ``[N, K]``), weight ``[N, M]`` -> ``[G, K, M]``;
    a group without rows is undefined.
    """
    name = "npu_grouped_matmul"
    set_ = sorted(key for key, value in others.items() if value is not None and not (key == "act_type" and value == 0))
    require(not set_, name, f"arguments {set_} are not emulated")
    require(
        len(x) == 1 and len(weight) == 1 and split_item in (2, 3), name, "needs one x, one weight, split_item 2 or 3"
    )
    rows, factors = x[0], weight[0]
    require(rows.dtype == factors.dtype and rows.dtype in FLOATS, name, f"got {rows.dtype} and {factors.dtype}")
    require(group_type in (0, 2), name, f"group_type={group_type} is not emulated, 0 and 2 are")
    require(rows.dim() == 2 and factors.dim() == (3 if group_type == 0 else 2), name, "wrong number of dims")
    require(rows.shape[-1] < INNER_LIMIT and factors.shape[-1] < INNER_LIMIT, name, f"a last dim is >= {INNER_LIMIT}")
    require(group_list is not None and group_list.dtype == torch.int64 and group_list.dim() == 1, name,
            "group_list must be a one-dim int64 tensor")  # fmt: skip
    require(group_list_type in (0, 1), name, f"group_list_type={group_list_type} is not emulated")
    require(rows.numel() > 0 and factors.numel() > 0, name, "empty tensors are not part of the contract")
    if group_list_type == 1:
        require(group_list.numel() > 1, name, "sizes of a single group are not part of the contract")
    stops = (group_list if group_list_type == 0 else group_list.cumsum(0)).tolist()
    starts = [0, *stops[:-1]]
    require(all(a <= b for a, b in zip(starts, stops, strict=True)), name, f"stops {stops} are not sorted")
    if group_type == 0:
        require(rows.is_contiguous(), name, "a transposed x is not supported with group_type 0")
        require(len(stops) == factors.shape[0] <= 1024, name, f"{len(stops)} groups, {factors.shape[0]} matrices")
        require(stops[-1] == rows.shape[0], name, f"groups of {stops[-1]} rows, x has {rows.shape[0]}")
        result = rows.new_full((rows.shape[0], factors.shape[2]), float("nan"))
        for group, (a, b) in enumerate(zip(starts, stops, strict=True)):
            result[a:b] = rows[a:b] @ factors[group]
        return [result]
    page = "aclnnGroupedMatmulV4.md of CANN"
    require(rows.t().is_contiguous(), name, f"{page} wants a transposed x for groupType 2")
    require(factors.is_contiguous(), name, f"{page} takes no transposed weight for groupType 2")
    require(stops[-1] == rows.shape[1] == factors.shape[0], name, f"stops {stops}, contracted dim {rows.shape[1]}")
    result = rows.new_full((len(stops), rows.shape[0], factors.shape[1]), float("nan"))
    for group, (a, b) in enumerate(zip(starts, stops, strict=True)):
        if a < b:
            result[group] = rows[:, a:b] @ factors[a:b]
    return [result]


def npu_moe_token_permute(
    tokens: torch.Tensor, indices: torch.Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of tokens ``[N, D]``, one per entry of indices ``[N, K]``, in the stable order of the entries.

    Returns the copies ``[N*K, D]`` (the first num_out_tokens of them), and for each entry its place in that order.
    """
    name = "npu_moe_token_permute"
    require(not padded_mode, name, "padded_mode is not emulated")
    require(tokens.dtype in FLOATS and tokens.dim() == 2, name, f"got {tokens.dtype}, {tokens.dim()} dims")
    require(indices.dtype in (torch.int32, torch.int64), name, f"indices are {indices.dtype}")
    require(indices.numel() < MOST_INDICES, name, f"at most {MOST_INDICES} indices")
    top_k = 1 if indices.dim() == 1 else indices.shape[1]
    order = torch.argsort(indices.reshape(-1), stable=True)
    kept = order[: num_out_tokens or order.numel()]
    return tokens.index_select(0, kept // top_k), torch.argsort(order).to(torch.int32)


def npu_moe_token_permute_grad_v2(
    grad_permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    tokens_size_0: int,
    tokens_dtype: torch.dtype,
    num_topK: int,  # noqa: N803 (the wheel's name)
    padded_mode: bool = False,
) -> torch.Tensor:
    """Each token's sum, in float, over the gradients of its copies."""
    copies = grad_permuted_tokens.float()
    missing = copies.new_zeros((sorted_indices.numel() - copies.shape[0], copies.shape[1]))
    per_entry = torch.cat([copies, missing]).index_select(0, sorted_indices.long())
    return per_entry.reshape(tokens_size_0, num_topK, copies.shape[1]).sum(1).to(tokens_dtype)


def npu_moe_token_unpermute(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row sorted_indices[i] for each i, weighted by probs ``[N, K]`` and summed over K if there are any.

    The second result is what torch_npu keeps for backward.
    """
    name = "npu_moe_token_unpermute"
    require(not padded_mode, name, "padded_mode is not emulated")
    require(permuted_tokens.dtype in FLOATS and permuted_tokens.dim() == 2, name, f"got {permuted_tokens.dtype}")
    page = "aclnnMoeTokenUnpermute.md of CANN"
    require(
        sorted_indices.dim() == 1 and sorted_indices.dtype == torch.int32,
        name,
        f"{page} lists INT32 for sortedIndices, of one dim, got {sorted_indices.dtype} of {sorted_indices.dim()}",
    )
    require(sorted_indices.unique().numel() == sorted_indices.numel(), name, f"{page} wants no index twice")
    require(
        sorted_indices.numel() == permuted_tokens.shape[0],
        name,
        f"{page} wants an index for each row, got {sorted_indices.numel()} for {permuted_tokens.shape[0]}",
    )
    rows = permuted_tokens.index_select(0, sorted_indices.long())
    if probs is not None:
        rows = rows.reshape(*probs.shape, rows.shape[-1]).float()
        rows = (rows * probs.unsqueeze(-1).float()).sum(1).to(permuted_tokens.dtype)
    return rows, permuted_tokens.clone()


def npu_moe_token_unpermute_grad_v2(
    grad_unpermuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    permuted_tokens_size_0: int,
    permuted_tokens_dtype: torch.dtype,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
    permuted_tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the permuted tokens and, if there are any, of probs."""
    grad, places = grad_unpermuted_tokens.float(), sorted_indices.long()
    if probs is not None:
        require(permuted_tokens is not None, "npu_moe_token_unpermute_grad_v2", "probs without permuted_tokens")
        rows = permuted_tokens.index_select(0, places).reshape(*probs.shape, -1).float()
        grad_probs = (rows * grad.unsqueeze(1)).sum(-1).to(probs.dtype)
        grad = (grad.unsqueeze(1) * probs.unsqueeze(-1).float()).reshape(-1, grad.shape[-1])
    else:
        grad_probs = grad.new_empty(0)
    result = grad.new_zeros((permuted_tokens_size_0, grad.shape[-1])).index_copy(0, places, grad)
    return result.to(permuted_tokens_dtype), grad_probs


CUSTOM_KERNELS = {
    "_npu_dtype_cast": npu_dtype_cast,
    "npu_grouped_matmul": npu_grouped_matmul,
    "npu_moe_token_permute": npu_moe_token_permute,
    "npu_moe_token_permute_grad_v2": npu_moe_token_permute_grad_v2,
    "_npu_moe_token_unpermute": npu_moe_token_unpermute,
    "npu_moe_token_unpermute_grad_v2": npu_moe_token_unpermute_grad_v2,
}
