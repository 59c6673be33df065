# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine on loopback; the cases themselves are neutral."""

import dispatch_cases
import pytest

from hyperep.loopback import run
from hyperep.platform.errors import RankFailure


@pytest.mark.parametrize(("ranks", "experts"), [(1, 4), (2, 2), (2, 4), (4, 4), (4, 8), (1, 130), (2, 262)])
def test_rows_arrive_where_they_should(ranks, experts):
    run(lambda platform: dispatch_cases.rows_arrive_where_they_should(platform, experts), ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    "case",
    [
        dispatch_cases.one_host_copy_per_dispatch,
        dispatch_cases.a_style_copies_once_for_any_number_of_experts,
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


@pytest.mark.parametrize("which", dispatch_cases.DISAGREEMENTS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_disagreement_on_experts_raises_on_all(which, ranks):
    run(lambda platform: dispatch_cases.disagreement_on_experts_raises_on_all(platform, which), ranks)


def test_errors_name_world_ranks():
    run(dispatch_cases.errors_name_world_ranks, 4)


@pytest.mark.parametrize("which", dispatch_cases.NOT_COMBINED)
@pytest.mark.parametrize("ranks", [1, 2])
def test_combine_refuses(which, ranks):
    run(lambda platform: dispatch_cases.combine_refuses(platform, which), ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_combine_takes_what_it_is_told(ranks):
    run(dispatch_cases.combine_takes_what_it_is_told, ranks)


def test_one_rank_that_breaks_the_contract_ends_the_run():
    with pytest.raises(RankFailure, match=r"rank 1 of 2 raised: ValueError: combine on rank 1: a row has shape"):
        run(dispatch_cases.experts_that_break_the_contract_on_one_rank, 2)
