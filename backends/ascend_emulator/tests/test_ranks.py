# SPDX-License-Identifier: Apache-2.0
"""Collectives between processes that MindSpore started: late, and loud where ranks disagree."""

from __future__ import annotations

import re

import pytest

from hyperep.launch.pool import RankPool
from hyperep.platform.errors import RankFailure


def test_a_result_is_there_when_it_was_waited_for_and_not_before(pools) -> None:
    """An emulated device whose work is done when the call returns hides every missing synchronisation."""
    assert pools(2).run("mindspore_programs:read_twice", {}, deadline=120) == [(False, True)] * 2


def test_ranks_that_disagree_all_abort_and_say_on_what() -> None:
    """Garbage, or an error on one rank while the other waits."""
    from hyperep_mindspore.launcher import launcher

    with RankPool(launcher, "mindspore", 2, start_deadline=240.0) as pool, pytest.raises(RankFailure) as failure:
        pool.run("mindspore_programs:disagree", {}, deadline=120)
    told = str(failure.value)
    assert "all_to_all: rank 0 sends 8 elements to rank 1, which expects 12" in told, told
    assert all(re.search(rf"rank {rank}( of 2|:) died: crashed with SIGABRT", told) for rank in (0, 1)), told


def test_a_reduction_that_a_page_of_hccl_does_not_list_is_refused_with_its_name() -> None:
    """What works here and fails on hardware only. Sums of float64 and uint8 the frameworks refuse by themselves."""
    from hyperep_mindspore.launcher import launcher

    with RankPool(launcher, "mindspore", 2, start_deadline=240.0) as pool:
        for said in pool.run("mindspore_programs:reduce_unlisted", {}, deadline=120):
            assert "HcclAllReduce does not list" in said, said


def test_buffers_of_a_group_are_as_large_as_was_asked_for(pools) -> None:
    """An option that HCCL never hears of, or that it hears for the groups of others."""
    small, usual = (f"emulated NPU: a communicator of 2 ranks with buffers of {size} MB" for size in (50, 200))
    assert pools(3).run("mindspore_programs:told_buffers", {}, deadline=120) == [
        [[small], []],
        [[small], [usual]],
        [[], [usual]],
    ]


def test_booleans_are_reduced_as_integers(pools) -> None:
    """A sum of two that is neither true nor false, or is false: HCCL adds up the bytes of booleans as int8."""
    expected = ([1, 1, 0], [1, 0, 0], [1, 1, 0])
    assert pools(2).run("mindspore_programs:reduce_booleans", {}, deadline=120) == [expected] * 2
