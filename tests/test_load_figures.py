# SPDX-License-Identifier: Apache-2.0
"""Load figures: by hand, and against rows that are placed one after the other."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hyperep.exchange.balance import plan
from hyperep.exchange.load import load_figures

#            e0  e1 | e2  e3
BY_HAND = [[10, 0, 1, 1], [6, 0, 0, 2]]


def test_figures_by_hand():
    found = load_figures(np.array(BY_HAND))  # loads 16, 0, 1, 3: mean 5
    assert found.expert_max_over_mean == 3.2
    assert found.expert_variation == pytest.approx(math.sqrt((11**2 + 5**2 + 4**2 + 2**2) / 4) / 5)
    assert found.expert_entropy == pytest.approx(-sum(p * math.log(p) for p in (16 / 20, 1 / 20, 3 / 20)) / math.log(4))
    assert found.dead_experts == 1
    assert found.rank_rows == (16, 4)
    assert found.rank_max_over_mean == 1.6
    assert found.rows_crossed == 2 + 6
    assert (found.copies, found.rows_saved) == (0, 0)
    assert json.loads(json.dumps(found.as_dict()))["rank_rows"] == [16, 4]


def test_a_copy_takes_rows_and_those_of_its_own_rank_do_not_cross():
    placement = plan(np.array(BY_HAND), slots=1, max_imbalance=1.0)  # a copy of e0 on rank 1 takes its 6
    found = load_figures(np.array(BY_HAND), placement)
    assert found.rank_rows == (10, 10)
    assert (found.copies, found.rows_saved, found.rows_crossed) == (1, 6, 2)
    assert found.expert_max_over_mean == 3.2


def test_where_nothing_is_spread_every_rank_computes_its_own_tokens():
    found = load_figures(np.array(BY_HAND), spread=False)
    assert (found.rank_rows, found.rows_crossed, found.rank_max_over_mean) == ((12, 8), 0, 1.2)


@pytest.mark.parametrize("counts", [np.zeros((2, 4)), np.full((2, 4), 7)])
def test_even_and_empty_loads_are_even(counts):
    found = load_figures(counts)
    assert (found.expert_max_over_mean, found.expert_variation, found.rank_max_over_mean) == (1.0, 0.0, 1.0)
    assert found.expert_entropy == pytest.approx(1.0)


def test_one_expert_alone_has_no_entropy():
    assert load_figures(np.array([[0, 9]])).expert_entropy == 0.0
    assert load_figures(np.array([[9]])).expert_entropy == 1.0


@given(
    counts=st.tuples(st.integers(1, 4), st.integers(1, 3)).flatmap(
        lambda size: arrays(np.int64, (size[0], size[0] * size[1]), elements=st.integers(0, 30))
    ),
    slots=st.integers(1, 2),
)
@settings(max_examples=80, deadline=None)
def test_figures_are_those_of_rows_that_are_placed_one_after_the_other(counts, slots):
    placement = plan(counts, slots=slots, max_imbalance=1.0)
    ranks, experts = counts.shape
    taken = {
        (copy, source): int(n)
        for copy, row in zip(placement.copies, placement.taken, strict=True)
        for source, n in enumerate(row)
    }
    rows, crossed = [0] * ranks, 0
    for source in range(ranks):
        for expert in range(experts):
            left = int(counts[source, expert])
            for copy in placement.copies:
                if copy.expert == expert:
                    moved = taken[copy, source]
                    left -= moved
                    rows[copy.rank] += moved
                    crossed += moved * (copy.rank != source)
            rows[expert * ranks // experts] += left
            crossed += left * (expert * ranks // experts != source)
    found = load_figures(counts, placement)
    assert list(found.rank_rows) == rows
    assert found.rows_crossed == crossed
    assert found.rows_saved == max(placement.before) - max(rows)


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="counts of 3 experts on 2 ranks"):
        load_figures(np.ones((2, 3)))
    with pytest.raises(ValueError, match="planned for other counts"):
        load_figures(np.ones((2, 4)), plan(np.array(BY_HAND), slots=1, max_imbalance=1.0))
