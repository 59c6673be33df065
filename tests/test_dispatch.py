# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine on loopback; the cases themselves are neutral."""

import dispatch_cases
import pytest

from hyperep.loopback import run


@pytest.mark.parametrize(("ranks", "experts"), [(1, 4), (2, 2), (2, 4), (4, 4), (4, 8)])
def test_rows_arrive_where_they_should(ranks, experts):
    run(lambda platform: dispatch_cases.rows_arrive_where_they_should(platform, experts), ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    "case",
    [
        dispatch_cases.one_host_copy_per_dispatch,
        dispatch_cases.two_dispatches_in_flight,
        dispatch_cases.recompute_repeats_everything_alike,
    ],
)
def test_case(case, ranks):
    run(case, ranks)


@pytest.mark.parametrize("which", dispatch_cases.BAD_INPUT)
@pytest.mark.parametrize("ranks", [2, 4])
def test_bad_input_on_one_rank_raises_on_all(which, ranks):
    run(lambda platform: dispatch_cases.bad_input_on_one_rank_raises_on_all(platform, which), ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_combine_wants_as_many_rows(ranks):
    run(dispatch_cases.combine_wants_as_many_rows, ranks)
