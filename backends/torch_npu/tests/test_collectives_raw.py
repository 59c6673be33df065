# SPDX-License-Identifier: Apache-2.0
"""The collectives of torch_npu's `hccl` process group, between processes."""

from __future__ import annotations

import re
import signal

import pytest
from ranks import Ended, run, succeed


def assert_aborted(end: Ended, message: str) -> None:
    """The rank ended by abort(), and said why."""
    assert end.code == -signal.SIGABRT, end.output
    assert re.search(message, end.output), end.output


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_collective_in_every_type_gives_what_numpy_gives(ranks: int) -> None:
    """Wrong offsets, types or reductions in HCCL."""
    succeed("collectives", ranks)


def test_large_messages_go_in_pieces() -> None:
    """A last piece that is cut off, or pieces that overwrite each other."""
    succeed("large", 3)


def test_sub_groups_do_not_disturb_each_other() -> None:
    """Groups that share a place in memory."""
    succeed("groups", 4)


@pytest.mark.emulator
@pytest.mark.parametrize(("program", "ranks"), [("read_without_wait", 2), ("early_host_copy", 1)])
def test_delayed_streams_expose_a_result_that_is_read_too_early(program: str, ranks: int) -> None:
    """An emulated device whose work is done when the call returns hides every missing synchronisation."""
    ended = succeed(program, ranks, extra={"EMULATED_NPU_DELAY_MS": "200"})
    assert all("EARLY False" in end.output for end in ended)


@pytest.mark.emulator
@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("split_mismatch", "all_to_all: rank 0 sends 8 elements to rank 1, which expects 12"),
        ("operation_mismatch", "rank 0 calls all_reduce where rank 1 calls broadcast"),
    ],
)
def test_ranks_that_disagree_all_abort_with_the_same_words(program: str, message: str) -> None:
    """Garbage, or an error on one rank while the other waits."""
    for end in run(program, 2):
        assert_aborted(end, message)


@pytest.mark.emulator
def test_a_dead_rank_ends_the_others() -> None:
    """Ranks that wait for ever."""
    *others, dead = run("dead_rank", 3)
    assert dead.code == 3
    for end in others:
        assert_aborted(end, r"rank 2 \(process \d+\) of communicator \S+ ended while rank")


@pytest.mark.emulator
def test_a_late_rank_is_waited_for_until_the_deadline() -> None:
    """A deadline that does not end the wait, or does not say for whom."""
    first, _ = run("late_rank", 2, timeout=45, extra={"EMULATED_NPU_DEADLINE_S": "3"})
    assert_aborted(first, r"waited 3 s in all_reduce \(call 1\) for rank 1")
