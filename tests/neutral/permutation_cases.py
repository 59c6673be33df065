# SPDX-License-Identifier: Apache-2.0
"""The token permutation against a naive one. Runs on every platform."""

import numpy as np
from measure import rows

from hyperep.permutation import generate_permute_indices, inverse_permutation, permute, unpermute

SHAPES = [(1, 1), (1, 5), (4, 1), (2, 3), (4, 8), (3, 2)]
"""(ranks, experts per rank)"""


def naive(counts, experts_per_rank, num_ranks):
    """For each expert, for each rank, the rows that the one got from the other, picked from a labelled list."""
    labels = [
        (r, e)
        for r in range(num_ranks)
        for e in range(experts_per_rank)
        for _ in range(counts[r * experts_per_rank + e])
    ]
    return [
        position
        for e in range(experts_per_rank)
        for r in range(num_ranks)
        for position, label in enumerate(labels)
        if label == (r, e)
    ]


def random_counts(seed, num_ranks, experts_per_rank):
    """Counts with empty ranks and empty experts among them."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 4, size=(num_ranks, experts_per_rank))
    kind = seed % 5
    if kind == 1:
        counts[rng.integers(num_ranks)] = 0
    if kind == 2:
        counts[:, rng.integers(experts_per_rank)] = 0
    if kind == 3:  # all rows from one rank to one expert
        counts[:] = 0
        counts[rng.integers(num_ranks), rng.integers(experts_per_rank)] = 7
    if kind == 4:
        counts[:] = 0
    return counts.ravel()


def indices_agree(seed, num_ranks, experts_per_rank, dtype):
    """Index, inverse and counts; dtypes, also of empty results."""
    counts = random_counts(seed, num_ranks, experts_per_rank).astype(dtype)
    index, per_expert = generate_permute_indices(counts, experts_per_rank, num_ranks)
    inverse = inverse_permutation(counts, experts_per_rank, num_ranks)
    assert index.tolist() == naive(counts.tolist(), experts_per_rank, num_ranks)
    assert per_expert.tolist() == counts.reshape(num_ranks, experts_per_rank).sum(axis=0).tolist()
    assert index[inverse].tolist() == list(range(counts.sum()))
    assert index.dtype == inverse.dtype == per_expert.dtype == np.int64


def rows_and_gradient_agree(platform, num_ranks, experts_per_rank):
    """``permute`` moves rows as the naive way does, ``unpermute`` moves them back, and gradients take the other way."""
    for seed in range(5):
        counts = random_counts(seed, num_ranks, experts_per_rank)
        order = naive(counts.tolist(), experts_per_rank, num_ranks)
        x, cotangent = rows(seed, len(order), 3), rows(50 + seed, len(order), 3)

        def there(x, counts=counts):
            return permute(x, counts, num_ranks, experts_per_rank, platform=platform)[0]

        out, pullback = platform.vjp(there, platform.from_host(x))
        gradient = platform.to_host(*pullback(platform.from_host(cotangent)))[0]
        assert np.array_equal(platform.to_host(out)[0], x[order])
        expected = np.zeros_like(cotangent)
        expected[order] = cotangent
        assert np.array_equal(gradient, expected)

        device_counts = platform.from_host(counts)
        moved, permutation, per_expert = permute(
            platform.from_host(x), device_counts, num_ranks, experts_per_rank, platform=platform
        )

        def back(y, permutation=permutation):
            return unpermute(y, permutation, platform=platform)

        out, pullback = platform.vjp(back, moved)
        gradient = platform.to_host(*pullback(platform.from_host(cotangent)))[0]
        assert np.array_equal(platform.to_host(out)[0], x)
        assert np.array_equal(gradient, cotangent[order])
        assert platform.to_host(per_expert)[0].tolist() == counts.reshape(num_ranks, -1).sum(axis=0).tolist()
