# SPDX-License-Identifier: Apache-2.0
"""The way that is compared with: what one writes first, one expert at a time.

Advanced indexing, assignment by index, a loop that indexes the weights, and a wait for the device wherever a size is
needed: six in one layer. Not for use. It takes tensors that can be assigned by index and keep their gradient, which is
more than the protocol asks for; where they cannot, the comparison is left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hyperep.mesh import DeviceMesh

__all__ = ["naive_layer", "reason_against"]


def reason_against(platform: Any) -> str:
    """Why the naive way cannot run on *platform*; empty if it can. Tried on two numbers."""
    order, x = platform.from_host(np.array([1, 0])), platform.from_host(np.array([[3.0], [4.0]], dtype=np.float32))

    def assign(x: Any) -> Any:
        result = platform.xp.zeros(x.shape, dtype=x.dtype)
        result[order] = x * 2.0
        return result

    try:
        out, pullback = platform.vjp(assign, x)
        out, gradient = platform.to_host(out, *pullback(x))
    except Exception as error:
        return f"assignment by index: {type(error).__name__}: {error}"
    right = out.ravel().tolist() == [8.0, 6.0] and gradient.ravel().tolist() == [8.0, 6.0]
    return "" if right else "assignment by index loses the gradient"


def naive_layer(mesh: DeviceMesh, weights: dict[str, Any], tokens: Any, choices: Any, scores: Any) -> Any:
    """Routed experts from tokens ``[T, D]`` to tokens: each choice of ``[T, K]`` is a row, weighted when it is back."""
    platform, xp = mesh.platform, mesh.platform.xp
    (count, top_k), experts = choices.shape, weights["w1"].shape[0] * mesh.size()
    flat = xp.reshape(choices, (count * top_k,))
    order = xp.argsort(flat, stable=True)
    counts = np.bincount(platform.to_host(flat)[0], minlength=experts)  # the first wait
    numbers = xp.reshape(xp.broadcast_to(xp.reshape(platform.arange(count), (count, 1)), choices.shape), (-1,))
    rows = _naive_experts(mesh, weights, tokens[numbers[order]], platform.from_host(counts))
    by_choice = xp.zeros(rows.shape, dtype=rows.dtype)
    by_choice[order] = rows
    weighted = xp.reshape(by_choice, (count, top_k, rows.shape[1])) * xp.expand_dims(scores, axis=2)
    return xp.astype(xp.sum(weighted, axis=1), tokens.dtype)


def _naive_experts(mesh: DeviceMesh, weights: dict[str, Any], rows: Any, counts: Any) -> Any:
    """Dispatch, experts and combine of rows ``[N, D]``, sorted by expert, with counts ``[E]``."""
    platform, group, ranks = mesh.platform, mesh.get_group(), mesh.size()
    xp = platform.xp
    local = counts.shape[0] // ranks
    received_counts = platform.all_to_all_single(counts, group=group)  # [R * L]
    by_owner = xp.sum(xp.reshape(counts, (ranks, local)), axis=1)
    by_source = xp.sum(xp.reshape(received_counts, (ranks, local)), axis=1)
    sent = platform.to_host(by_owner)[0].tolist()  # the second
    received = platform.to_host(by_source)[0].tolist()  # the third
    buffer = platform.differentiable_all_to_all_single(rows, sent, received, group)

    order, sizes = _expert_major(platform, received_counts, ranks, local)  # the fourth and the fifth
    permuted = buffer[order]
    outputs, start = [], 0
    for expert, size in enumerate(platform.to_host(sizes)[0].tolist()):  # the sixth
        part = permuted[start : start + size]
        gate = part @ xp.permute_dims(weights["w1"][expert], (1, 0))
        up = part @ xp.permute_dims(weights["w3"][expert], (1, 0))
        hidden = gate * (1.0 / (1.0 + xp.exp(-gate))) * up
        outputs.append(hidden @ xp.permute_dims(weights["w2"][expert], (1, 0)))
        start += size
    result = xp.zeros(buffer.shape, dtype=buffer.dtype)
    result[order] = xp.concat(outputs, axis=0)
    return platform.differentiable_all_to_all_single(result, received, sent, group)


def _expert_major(platform: Any, counts: Any, ranks: int, local: int) -> tuple[Any, Any]:
    """Which received row each expert-major row is, and how many rows each expert has; a wait for each of two sizes."""
    xp = platform.xp
    starts = xp.cumulative_sum(counts) - counts
    turned = xp.permute_dims(xp.reshape(counts, (ranks, local)), (1, 0))
    starts = xp.permute_dims(xp.reshape(starts, (ranks, local)), (1, 0))
    lengths = platform.to_host(turned)[0].reshape(-1)
    first = platform.to_host(starts)[0].reshape(-1)
    ends = np.cumsum(lengths)
    order = np.repeat(first - (ends - lengths), lengths) + np.arange(int(ends[-1]))
    return platform.from_host(order), xp.sum(xp.reshape(counts, (ranks, local)), axis=0)
