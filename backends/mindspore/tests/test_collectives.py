# SPDX-License-Identifier: Apache-2.0
"""Collectives, their gradients and groups, between one, two and four real ranks."""

import pytest
import rank_cases

KINDS = ["uneven", "silent rank", "deaf rank", "to the next", "nothing"]
DEADLINE = 120.0


def _run(ranks, case, **arguments):
    return ranks.run(f"rank_cases:{case}", arguments, deadline=DEADLINE)


def test_ranks_are_numbered(ranks):
    assert _run(ranks, "world") == [(r, ranks.ranks) for r in range(ranks.ranks)]


def test_all_to_all_moves_rows_of_every_dtype(ranks):
    _run(ranks, "all_to_all", kind="uneven", tail=(3,), dtypes=rank_cases.DTYPES)


@pytest.mark.parametrize("tail", [(), (2, 5)], ids=["1-D", "3-D"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_to_all_splits_count_rows(ranks, kind, tail):
    _run(ranks, "all_to_all", kind=kind, tail=tail, dtypes=("float32",))


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_goes_back(ranks, kind):
    _run(ranks, "all_to_all_gradient", kind=kind)


@pytest.mark.parametrize(
    "case",
    [
        "even_all_to_all",
        "reductions",
        "empty_collectives",
        "nothing_is_recorded",
        "tensor_parallel_pair",
        "plain_reduction_of_gradients",
        "groups",
        "several_under_way",
        "bad_splits",
    ],
)
def test_between_ranks(ranks, case):
    _run(ranks, case)


@pytest.mark.parametrize(
    "case", ["even_all_to_all", "reductions", "empty_collectives", "tensor_parallel_pair", "groups"]
)
def test_alone(platform, case):
    getattr(rank_cases, case)(platform)


@pytest.mark.parametrize("ranks", [[1, 0], [0, 0], [], [3], [-1]])
def test_impossible_groups(platform, ranks):
    with pytest.raises(ValueError, match=r"new_group\(.*ascending"):
        platform.new_group(ranks)


def test_unknown_reductions_and_sources(platform):
    with pytest.raises(ValueError, match=r"op='mean'.*choose one of"):
        platform.all_reduce(platform.xp.ones((1,)), op="mean")
    with pytest.raises(ValueError, match=r"source=1.*ranks 0 to 0"):
        platform.broadcast(platform.xp.ones((1,)), 1)
