# SPDX-License-Identifier: Apache-2.0
"""What a watcher goes by: time in which it could run itself, and counts of steps that stand still."""

import pytest

from hyperep.launch import clock
from hyperep.launch.clock import RunningClock
from hyperep.launch.steps import LateRanks, StepCounts, counting_steps, step_done
from hyperep.launch.timeout import DEFAULT_TIMEOUT, TIMEOUT_VARIABLE, step_timeout, use_timeout


def test_time_in_which_the_process_was_suspended_does_not_count(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    seconds = RunningClock(gap=2.0)
    for step, total in ((0.5, 0.5), (1.5, 2.0), (3600.0, 4.0), (1.0, 5.0)):
        now[0] += step
        assert seconds() == total


def test_a_rank_is_late_when_its_own_count_stands_still():
    now = [0.0]
    late = LateRanks(10.0, lambda: now[0])
    assert late({0: 7, 1: 0}) == []  # a count of an earlier task is no step of this one
    now[0] = 9.0
    assert late({0: 8, 1: 0}) == []
    now[0] = 10.0
    assert late({0: 8, 1: 0}) == [1]
    now[0] = 19.0
    assert late({0: 8}) == [0]
    assert LateRanks(None, lambda: now[0])({0: 0}) == []


def test_a_step_is_counted_by_whoever_watches_this_thread(tmp_path):
    step_done()  # nobody does
    with open(tmp_path / "counts", "w+b") as file:
        counts = StepCounts(file.fileno())
        with counting_steps(lambda: counts.write(2, counts.read(2) + 1)):
            step_done()
            step_done()
        step_done()
        assert [counts.read(position) for position in range(4)] == [0, 0, 2, 0]


def test_the_timeout_is_settable_and_has_a_default(monkeypatch):
    monkeypatch.delenv(TIMEOUT_VARIABLE, raising=False)
    assert step_timeout() == DEFAULT_TIMEOUT == 600.0
    with use_timeout(2.5):
        assert step_timeout() == 2.5
    assert step_timeout() == DEFAULT_TIMEOUT
    monkeypatch.setenv(TIMEOUT_VARIABLE, "30")
    with use_timeout(None):
        assert step_timeout() == 30.0
    for text in ("soon", "0", "-1", "nan", "inf"):
        monkeypatch.setenv(TIMEOUT_VARIABLE, text)
        with pytest.raises(ValueError, match=f"HYPEREP_TIMEOUT='{text}' must be a positive number of seconds"):
            step_timeout()
    with pytest.raises(ValueError, match="timeout=0 must be a positive number"), use_timeout(0):
        pass
