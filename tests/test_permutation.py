# SPDX-License-Identifier: Apache-2.0
"""Token permutation: cases worked by hand, and random ones against the naive way."""

import permutation_cases
import pytest

from hyperep.loopback import run
from hyperep.permutation import generate_permute_indices, inverse_permutation, permute

HAND_WORKED = {
    # counts by rank, then expert; rank-major rows are numbered from 0.
    "two ranks, two experts": (([1, 2], [3, 0]), [0, 3, 4, 5, 1, 2], [4, 2]),
    "one rank": (([2, 0, 1],), [0, 1, 2], [2, 0, 1]),
    "one expert": (([2], [1], [0]), [0, 1, 2], [3]),
    "three ranks": (([1, 1], [0, 2], [2, 1]), [0, 4, 5, 1, 2, 3, 6], [3, 4]),
    "empty rank": (([1, 1], [0, 0], [1, 1]), [0, 2, 1, 3], [2, 2]),
    "empty expert": (([0, 2], [0, 1]), [0, 1, 2], [0, 3]),
    "all rows to one rank's last expert": (([0, 3], [0, 2]), [0, 1, 2, 3, 4], [0, 5]),
    "nothing": (([0, 0], [0, 0]), [], [0, 0]),
}


@pytest.mark.parametrize(("by_rank", "index", "per_expert"), HAND_WORKED.values(), ids=HAND_WORKED)
def test_hand_worked(by_rank, index, per_expert):
    counts = [n for row in by_rank for n in row]
    got, got_per_expert = generate_permute_indices(counts, len(by_rank[0]), len(by_rank))
    assert got.tolist() == index
    assert got_per_expert.tolist() == per_expert
    inverse = inverse_permutation(counts, len(by_rank[0]), len(by_rank))
    assert [index[i] for i in inverse.tolist()] == list(range(len(index)))


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize(("num_ranks", "experts_per_rank"), permutation_cases.SHAPES)
def test_random_indices_agree_with_the_naive_way(num_ranks, experts_per_rank, dtype):
    for seed in range(25):
        permutation_cases.indices_agree(seed, num_ranks, experts_per_rank, dtype)


@pytest.mark.parametrize(("num_ranks", "experts_per_rank"), permutation_cases.SHAPES)
def test_rows_and_gradients_agree_with_the_naive_way(num_ranks, experts_per_rank):
    run(lambda platform: permutation_cases.rows_and_gradient_agree(platform, num_ranks, experts_per_rank), 1)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1, 2, 3], r"shape \(3,\).*2 ranks with 2 experts each need \(4,\)"),
        ([[1, 2], [3, 0]], r"shape \(2, 2\).*need \(4,\)"),
        ([1, 2, -3, 0], "holds -3; counts cannot be negative"),
    ],
)
def test_bad_counts(counts, message):
    for function in (generate_permute_indices, inverse_permutation):
        with pytest.raises(ValueError, match=message):
            function(counts, 2, 2)


def test_counts_that_do_not_sum_to_the_rows():
    def on_rank(platform):
        with pytest.raises(ValueError, match="counts sum to 6 but there are 5 rows"):
            permute(platform.xp.zeros((5, 2)), [1, 2, 3, 0], 2, 2, platform=platform)

    run(on_rank, 1)
