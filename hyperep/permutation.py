# SPDX-License-Identifier: Apache-2.0
"""Token permutation: from rank-major rows, as they arrive, to expert-major rows, as experts want them.

After an all-to-all among ``R`` ranks, a rank that owns ``L`` experts holds ``R * L`` runs of rows::

    rank-major                              expert-major
    [ r0 e0 | r0 e1 | r1 e0 | r1 e1 ]  -->  [ r0 e0 | r1 e0 | r0 e1 | r1 e1 ]

The arithmetic is done on the host, in int64, from counts that are there already; see ``hyperep.exchange.rows``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hyperep.platform.protocol import Platform

__all__ = ["Permutation", "generate_permute_indices", "inverse_permutation", "permute", "unpermute"]


def generate_permute_indices(
    tokens_per_expert_group: Any, experts_per_rank: int, num_ranks: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where each expert-major row comes from in the rank-major buffer.

    Args:
        tokens_per_expert_group: integers ``[R * L]`` on the host; entry ``r * L + e`` counts the rows that came from
            rank ``r`` for local expert ``e``.
        experts_per_rank: ``L``.
        num_ranks: ``R``.

    Returns:
        ``permuted_indices``, int64 ``[N]``: destination row ``i`` is source row ``permuted_indices[i]``; and
        ``num_tokens_per_expert``, int64 ``[L]``.

    Raises:
        ValueError: the counts have the wrong length, or one is negative.

    Example:
        >>> generate_permute_indices([1, 2, 3, 0], experts_per_rank=2, num_ranks=2)
        (array([0, 3, 4, 5, 1, 2]), array([4, 2]))
    """
    counts = _counts(tokens_per_expert_group, experts_per_rank, num_ranks)  # [R, L]
    starts = (np.cumsum(counts) - counts.ravel()).reshape(counts.shape)  # [R, L] first row of each run
    return _ramps(starts.T.ravel(), counts.T.ravel()), counts.sum(axis=0)


def inverse_permutation(tokens_per_expert_group: Any, experts_per_rank: int, num_ranks: int) -> np.ndarray:
    """The way back: rank-major row ``i`` is expert-major row ``inverse[i]``; int64 ``[N]``.

    The inverse of a permutation of runs is again one, so no sort and no scatter are needed. Arguments and errors are
    those of :func:`generate_permute_indices`.
    """
    counts = _counts(tokens_per_expert_group, experts_per_rank, num_ranks).T  # [L, R]
    starts = (np.cumsum(counts) - counts.ravel()).reshape(counts.shape)
    return _ramps(starts.T.ravel(), counts.T.ravel())


@dataclass(frozen=True, eq=False, slots=True)
class Permutation:
    """A row permutation on the device with its inverse: int64 tensors ``[N]``, or ``None`` for the identity."""

    index: Any = None
    inverse: Any = None

    @property
    def identity(self) -> bool:
        """Whether rows stay where they are."""
        return self.index is None


def permute(
    x: Any, tokens_per_expert_group: Any, ep_degree: int, num_local_experts: int, *, platform: Platform[Any]
) -> tuple[Any, Permutation, Any]:
    """Reorder received rows from rank-major to expert-major.

    Args:
        x: rows ``[N, ...]``.
        tokens_per_expert_group: integers ``[R * L]``, on the host or (at the cost of one host copy) on the device.
        ep_degree: ``R``.
        num_local_experts: ``L``.
        platform: the platform of *x*.

    Returns:
        The rows, the permutation for :func:`unpermute`, and ``num_tokens_per_expert``, an int64 tensor ``[L]``.
    """
    if platform.is_tensor(tokens_per_expert_group) and not isinstance(tokens_per_expert_group, np.ndarray):
        tokens_per_expert_group = platform.to_host(tokens_per_expert_group)[0]  # host sync here
    counts = _counts(tokens_per_expert_group, num_local_experts, ep_degree)  # [R, L]
    if counts.sum() != x.shape[0]:
        raise ValueError(f"counts sum to {counts.sum()} but there are {x.shape[0]} rows; every row needs a count")
    permutation = device_permutation(platform, counts)
    return apply_permutation(platform, x, permutation), permutation, platform.from_host(counts.sum(axis=0))


def unpermute(rows: Any, permutation: Permutation, *, platform: Platform[Any]) -> Any:
    """Reorder expert-major rows back to rank-major; the reverse of :func:`permute`, also in its gradient."""
    if permutation.identity:
        return rows
    return platform.permute_rows(rows, permutation.inverse, permutation.index)


def apply_permutation(platform: Platform[Any], x: Any, permutation: Permutation) -> Any:
    """Rows of *x* in the permutation's order."""
    return x if permutation.identity else platform.permute_rows(x, permutation.index, permutation.inverse)


def device_permutation(platform: Platform[Any], counts: np.ndarray) -> Permutation:
    """The permutation for counts ``[R, L]`` on the device, or the identity if nothing moves."""
    ranks, local = counts.shape
    if local == 1 or ranks == 1:
        return Permutation()  # one run per expert, or per rank: rank-major already is expert-major
    index, _ = generate_permute_indices(counts.ravel(), local, ranks)
    return Permutation(platform.from_host(index), platform.from_host(inverse_permutation(counts.ravel(), local, ranks)))


def _counts(counts: Any, experts_per_rank: int, num_ranks: int) -> np.ndarray:
    counts = np.asarray(counts)
    if counts.shape != (experts_per_rank * num_ranks,):
        raise ValueError(
            f"tokens_per_expert_group has shape {counts.shape}, but {num_ranks} ranks with {experts_per_rank} experts "
            f"each need ({num_ranks * experts_per_rank},)"
        )
    if counts.size and counts.min() < 0:
        raise ValueError(f"tokens_per_expert_group holds {counts.min()}; counts cannot be negative")
    return counts.astype(np.int64).reshape(num_ranks, experts_per_rank)


def _ramps(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate ``arange(start, start + length)`` over the runs."""
    offsets = np.cumsum(lengths) - lengths  # where each run begins in the result
    return np.repeat(starts - offsets, lengths) + np.arange(lengths.sum(), dtype=np.int64)
