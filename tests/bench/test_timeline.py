# SPDX-License-Identifier: Apache-2.0
"""When exchanges were on their way and ranks computed: arithmetic by hand, and runs on loopback."""

import json

import numpy as np
import pytest

from hyperep.bench.apart import Apart
from hyperep.bench.program import follow
from hyperep.bench.shapes import Shape
from hyperep.bench.timeline import Span, computing, most_in_flight, overlap_ms
from hyperep.bench.timeline_picture import lanes
from hyperep.bench.way import Way
from hyperep.cli import main
from hyperep.loopback import run
from hyperep.mesh import init_device_mesh

SMALL = Shape(name="small", tokens=24, dim=6, hidden=10, experts=8, top_k=3)

# Computes until 2, waits until 3 for what was issued at 1; computes until 6; waits until 8 for what was issued at 4.
TWO = [Span(1, 2, 3, 100), Span(4, 6, 8, 50)]
# Three at a time: issued at 0, 0 and 1, waited for one after the other.
CROWD = [Span(0, 2, 3, 7), Span(0, 3, 4, 7), Span(1, 5, 5, 7)]


def test_a_rank_computes_when_it_does_not_wait():
    assert computing(TWO, 10) == [(0, 2), (3, 6), (8, 10)]
    assert computing(CROWD, 6) == [(0, 2), (4, 5), (5, 6)]
    assert computing([], 3) == [(0, 3)]


def test_overlap_is_what_is_on_its_way_while_the_rank_computes():
    assert overlap_ms(TWO, 10) == (2 - 1) + (6 - 4)
    assert overlap_ms([Span(1, 1, 3, 100)], 10) == 0


def test_bytes_in_flight_are_counted_together():
    assert most_in_flight(TWO, 10) == 100
    assert most_in_flight(CROWD, 6) == 21
    assert most_in_flight([], 1) == 0


def test_bytes_that_a_rank_waits_for_at_once_are_hidden_behind_nothing():
    assert most_in_flight([Span(1, 1, 3, 100), Span(4, 4, 5, 7)], 10) == 0


def test_no_span_is_drawn_over_another():
    assert lanes(TWO) == [0, 0]
    assert lanes(CROWD) == [0, 1, 2]


@pytest.mark.parametrize("ranks", [2, 4])
def test_chunks_are_in_flight_while_ranks_compute(ranks):
    both = run(lambda p: [follow(p, SMALL, Way(chunks=chunks, timeline=True)) for chunks in (1, 3)], ranks)
    for waiting, chunked in both:
        assert waiting["overlap_ms"] == waiting["in_flight_bytes"] == 0
        assert chunked["overlap_ms"] > 0
        assert chunked["in_flight_bytes"] > 0
        titles = [of["title"] for of in chunked["timelines"]]
        assert titles == ["3 chunks", "waiting for each exchange"]
        assert [of["title"] for of in waiting["timelines"]] == titles[1:]
        for of in chunked["timelines"][0]["ranks"]:
            assert len(of["exchanges"]) == 1 + 9 + 9
            assert all(e["issued_ms"] <= e["waited_ms"] <= e["arrived_ms"] <= of["end_ms"] for e in of["exchanges"])
            assert of["forward_ms"] <= of["end_ms"]
        # What another rank noted is what this one was told.
        assert [of["rank"] for of in chunked["timelines"][0]["ranks"]] == list(range(ranks))


def test_arithmetic_without_the_wire_is_that_of_the_layer():
    def apart(platform):
        mesh = init_device_mesh(platform, (2,), ("ep",))
        found = Apart(mesh, SMALL, Way().style)
        issued = []
        original = type(platform).all_to_all_single

        def noting(self, x, *arguments, **options):
            issued.append(tuple(x.shape))
            return original(self, x, *arguments, **options)

        platform.all_to_all_single = noting.__get__(platform)
        first, second = found.arithmetic(), found.arithmetic()
        assert not issued
        found.wire()
        assert len(issued) == 1 + 3 + 3
        for one, other in zip(first, second, strict=True):
            np.testing.assert_array_equal(one, other)

    run(apart, 2)


def test_the_command_draws_both_ways(tmp_path, capsys):
    picture = tmp_path / "wire.svg"
    words = "bench --platform loopback --shape finest --chunks 2 --repetitions 1 --no-naive --json"
    with pytest.raises(SystemExit) as ended:
        main([*words.split(), "--timeline", str(picture)])
    assert not ended.value.code
    (record,) = json.loads(capsys.readouterr().out)
    assert record["chunks"] == 2
    assert all(record[key] > 0 for key in ("wire_ms", "arithmetic_ms", "waiting_ms", "in_flight_bytes"))
    drawn = picture.read_text()
    assert "finest, 2 chunks" in drawn
    assert "finest, waiting for each exchange" in drawn


def test_one_layer_is_drawn_at_a_time(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--platform", "loopback", "--sweep", "tokens", "--timeline", str(tmp_path / "wire.svg")])
    assert ended.value.code == 2
    assert "shows one layer" in capsys.readouterr().err
