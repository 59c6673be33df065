# SPDX-License-Identifier: Apache-2.0
"""The planner of balanced experts: by hand, by its promises on any counts, and against loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hyperep.exchange.balance import Balance, Copy, plan


@st.composite
def problems(draw):
    ranks, owned = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    peak = draw(st.sampled_from([0, 1, 3, 40, 1000]))
    counts = draw(arrays(np.int64, (ranks, ranks * owned), elements=st.integers(0, peak)))
    hot = draw(st.integers(0, ranks * owned - 1))
    counts[:, hot] *= draw(st.sampled_from([1, 10, 100]))
    return counts, {
        "slots": draw(st.integers(1, 3)),
        "max_imbalance": draw(st.sampled_from([1.0, 1.05, 1.15, 1.5, 3.0])),
        "rows_per_copy": draw(st.sampled_from([0, 1, 10, 200])),
    }


def test_by_hand():
    # e0 has 60 rows, 40 of them from rank 0; rank 1 has room for 24, and its own 20 come first.
    counts = np.array([[40, 1, 5, 5], [20, 3, 3, 3]])
    found = plan(counts, slots=1, max_imbalance=1.1)
    assert (found.before, found.loads, found.bound, found.within) == ((64, 16), (40, 40), 44, True)
    assert found.copies == (Copy(rank=1, expert=0),)
    assert found.taken.tolist() == [[4, 20]]
    assert (found.rows_moved, found.width, found.slots(0), found.slots(1)) == (24, 3, (), (0,))
    assert (found.rows_of(0), found.rows_of(1)) == ((40, 0), (16, 24))
    # Rank 0 has experts 0 and 1 as 0 and 1, rank 1 has 2 and 3 as 3 and 4, and the copy of 0 as 5.
    assert found.places(0).tolist() == [5] * 4 + [0] * 36 + [1] + [3] * 5 + [4] * 5
    assert found.places(1).tolist() == [5] * 20 + [1] * 3 + [3] * 3 + [4] * 3
    assert (found.sent(0), found.sent(1)) == (([0], [0, 1]), ([], [0, 0]))
    assert (found.received(0), found.received(1)) == ([0, 0], [1, 0])


def test_nothing_is_copied_that_need_not_be():
    even = np.full((4, 8), 10)
    found = plan(even, slots=2, max_imbalance=1.0)
    assert (found.copies, found.within, found.width) == ((), True, 2)
    hot = even + np.array([3] + [0] * 7)
    assert plan(hot, slots=2, max_imbalance=1.15).copies == ()
    assert plan(hot, slots=2, max_imbalance=1.0).copies != ()
    # Nor what does not pay.
    assert plan(hot, slots=2, max_imbalance=1.0, rows_per_copy=100).copies == ()


def test_a_bound_that_cannot_be_kept_is_told():
    counts = np.zeros((4, 4), dtype=np.int64)
    counts[:, 0] = 100
    found = plan(counts, slots=1, max_imbalance=1.0)
    assert (found.within, found.loads) == (True, (100, 100, 100, 100))
    # Four hot experts of one rank, and two others that take one each.
    counts = np.zeros((3, 12), dtype=np.int64)
    counts[:, :4] = 30
    found = plan(counts, slots=1, max_imbalance=1.1)
    assert not found.within
    assert max(found.loads) < 360


@settings(max_examples=300, deadline=None)
@given(problems())
def test_promises(problem):
    counts, how = problem
    ranks, experts = counts.shape
    found = plan(counts, **how)
    owned = experts // ranks
    total, taken = counts.sum(), found.taken.sum(axis=1)
    # What is copied.
    assert len(set(found.copies)) == len(found.copies)
    assert list(found.copies) == sorted(found.copies)
    assert all(copy.expert // owned != copy.rank for copy in found.copies)
    assert all(len(found.slots(rank)) <= how["slots"] for rank in range(ranks))
    assert all(rows >= max(how["rows_per_copy"], 1) for rows in taken)
    # Of nobody more than there is, and an owner keeps some.
    for expert in range(experts):
        of = [i for i, copy in enumerate(found.copies) if copy.expert == expert]
        assert (found.taken[of].sum(axis=0) <= counts[:, expert]).all()
        assert (found.taken[of] >= 0).all()
        assert not of or taken[of].sum() < counts[:, expert].sum()
    # Loads.
    assert sum(found.loads) == total
    assert max(found.loads) <= max(found.before)
    assert found.bound >= how["max_imbalance"] * total / ranks - 1
    assert found.within == (max(found.loads) <= found.bound)
    if max(found.before) <= found.bound:
        assert not found.copies
    # A rank that was relieved is not below the mean for it, and one that helps is not above.
    even = -(-total // ranks)
    for rank in range(ranks):
        if found.loads[rank] < found.before[rank]:
            assert found.loads[rank] >= even
        elif found.loads[rank] > found.before[rank]:
            assert found.loads[rank] <= even


@settings(max_examples=200, deadline=None)
@given(problems())
def test_nothing_more_would_help_where_the_bound_is_not_kept(problem):
    counts, how = problem
    found = plan(counts, **how)
    ranks, owned = len(counts), counts.shape[1] // len(counts)
    even, loads = -(-int(counts.sum()) // ranks), found.loads
    kept = counts.sum(axis=0)
    for copy, rows in zip(found.copies, found.taken.sum(axis=1), strict=True):
        kept[copy.expert] -= rows
    for source in range(ranks):
        if loads[source] <= found.bound:
            continue
        for expert in range(source * owned, (source + 1) * owned):
            for target in range(ranks):
                rows = min(loads[source] - even, even - loads[target], kept[expert] - 1)
                known = Copy(target, expert) in found.copies
                free = len(found.slots(target)) < how["slots"] and rows >= how["rows_per_copy"]
                assert target == source or rows < 1 or not (known or free), (source, expert, target, rows)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_places_are_those_of_a_loop(problem):
    counts, how = problem
    found = plan(counts, **how)
    ranks, owned, width = found.ranks, found.owned, found.width
    computed = np.zeros((ranks, width), dtype=np.int64)
    for source in range(ranks):
        places = found.places(source)
        experts = np.repeat(np.arange(found.experts), counts[source])
        assert len(places) == len(experts)
        for expert, place in zip(experts.tolist(), places.tolist(), strict=True):
            rank, local = divmod(place, width)
            computed[rank, local] += 1
            is_there = rank * owned + local if local < owned else found.slots(rank)[local - owned]
            assert is_there == expert
    assert tuple(computed.sum(axis=1).tolist()) == found.loads
    for rank in range(ranks):
        assert found.rows_of(rank) == (computed[rank, :owned].sum(), computed[rank, owned:].sum())


@settings(max_examples=200, deadline=None)
@given(problems())
def test_weights_that_are_sent_are_those_that_arrive(problem):
    counts, how = problem
    found = plan(counts, **how)
    for to in range(found.ranks):
        arriving = []
        for owner in range(found.ranks):
            local, splits = found.sent(owner)
            begin = sum(splits[:to])
            arriving += [owner * found.owned + i for i in local[begin : begin + splits[to]]]
            assert splits[to] == found.received(to)[owner]
        assert tuple(arriving) == found.slots(to)


@settings(max_examples=50, deadline=None)
@given(problems())
def test_the_same_counts_give_the_same_plan(problem):
    counts, how = problem
    one, other = plan(counts, **how), plan(counts.copy(order="F"), **how)
    assert one.copies == other.copies
    np.testing.assert_array_equal(one.taken, other.taken)


def test_settings_are_checked():
    for wrong in ({"slots": 0}, {"slots": True}, {"max_imbalance": 0.9}, {"rows_per_copy": -1}):
        with pytest.raises(ValueError, match=f"Balance.{next(iter(wrong))}="):
            Balance(**wrong)
    with pytest.raises(ValueError, match="must divide"):
        plan(np.ones((2, 3), np.int64), slots=1, max_imbalance=1.0)
