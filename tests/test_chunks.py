# SPDX-License-Identifier: Apache-2.0
"""Schedules as values; and layers in chunks on loopback, by the neutral cases."""

import operator

import chunk_cases
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperep.exchange.chunks import _add_up
from hyperep.exchange.schedule import Action, Step, Steps, bounds, follow, joined, schedule
from hyperep.loopback import run

LIFE = [Action.SEND, Action.RECEIVE, Action.COMPUTE, Action.RETURN, Action.COLLECT]


@given(st.integers(1, 40))
def test_every_part_lives_its_life_and_no_more_than_two_are_on_their_way(parts):
    order = schedule(parts)
    assert [step.action for step in order].count(Action.MEANWHILE) == 1
    for part in range(parts):
        assert [s.action for s in order if s.part == part and s.action is not Action.MEANWHILE] == LIFE
    flying = set()
    most = 0
    for step in order:
        if step.action in (Action.SEND, Action.RETURN):
            flying.add(step.part)
        elif step.action in (Action.RECEIVE, Action.COLLECT):
            flying.discard(step.part)
        most = max(most, len(flying))
    assert most == min(parts, 2)


@given(st.integers(3, 40))
def test_the_wire_is_never_idle_while_a_part_is_computed_before_the_last(parts):
    flying = set()
    for step in schedule(parts):
        if step.action in (Action.SEND, Action.RETURN):
            flying.add(step.part)
        elif step.action in (Action.RECEIVE, Action.COLLECT):
            flying.discard(step.part)
        elif step.action in (Action.COMPUTE, Action.MEANWHILE):
            assert flying, step


def test_three_parts_as_drawn():
    drawn = (
        "send 0, send 1, meanwhile 0, receive 0, compute 0, return 0, receive 1, send 2, compute 1, collect 0, "
        "return 1, receive 2, compute 2, collect 1, return 2, collect 2"
    )
    assert ", ".join(map(str, schedule(3))) == drawn
    with pytest.raises(ValueError, match="at least one part"):
        schedule(0)


def test_what_a_step_returns_is_what_the_next_one_of_its_part_gets():
    told = []

    def step(name):
        def call(part, held=None):
            told.append((name, part, held))
            return f"{name} {part}"

        return call

    names = ("send", "receive", "compute", "give_back", "collect")
    follow(schedule(3), Steps(**{name: step(name) for name in names}, meanwhile=lambda: told.append("meanwhile")))
    assert told[2] == "meanwhile"
    before = dict(zip(names[1:], names[:-1], strict=True))
    for name, part, held in (entry for entry in told if entry != "meanwhile"):
        assert held == (f"{before[name]} {part}" if name in before else None)


@given(st.integers(0, 50), st.integers(1, 20))
def test_bounds_cover_all_rows_evenly(rows, parts):
    found = bounds(rows, parts)
    assert [i for a, b in found for i in range(a, b)] == list(range(rows))
    sizes = [b - a for a, b in found]
    assert len(sizes) == parts
    between = sizes[1:-1] if parts > 2 else sizes
    assert max(between) - min(between) <= 1
    for size in sizes if parts < 3 else (sizes[0], sizes[-1]):
        assert abs(size - between[0] / (2 if parts > 2 else 1)) < 1.5


@given(st.integers(0, 50), st.integers(1, 5), st.integers(1, 4))
def test_joined_runs_cover_the_same_rows(rows, parts, each):
    cuts = bounds(rows, parts * each)
    found = joined(cuts, parts)
    assert len(found) == parts
    assert [i for a, b in found for i in range(a, b)] == list(range(rows))
    assert {edge for run in found for edge in run} <= {edge for run in cuts for edge in run}


def test_steps_are_values():
    assert Step(Action.SEND, 1) == Step(Action.SEND, 1)
    assert len({*schedule(4), *schedule(4)}) == len(schedule(4))


class _Counted:
    alive = most = 0

    def __init__(self, value):
        self.value = value
        _Counted.alive += 1
        _Counted.most = max(_Counted.most, _Counted.alive)

    def __del__(self):
        _Counted.alive -= 1

    def __add__(self, other):
        return _Counted(self.value + other.value)

    def __iadd__(self, other):
        self.value += other.value
        return self


@pytest.mark.parametrize(("add", "more"), [(operator.add, 1), (operator.iadd, 0)])
def test_gradients_of_parts_are_added_one_after_the_other(add, more):
    """Else there are three sets of them at a time."""
    _Counted.most = 0
    sums, terms = ([_Counted(first + i) for i in range(3)] for first in (0, 10))
    _add_up(sums, terms, add)
    assert _Counted.most == 6 + more
    assert [x.value for x in sums] == [10, 12, 14]
    assert _Counted.alive == 3


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("case", chunk_cases.CASES)
def test_on_ranks(case, ranks):
    if ranks > 1 or case is not chunk_cases.no_more_than_two_parts_are_in_flight:
        run(case, ranks)
