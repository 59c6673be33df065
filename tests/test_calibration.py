# SPDX-License-Identifier: Apache-2.0
"""How many chunks pay: arithmetic, files, and layers that choose by them."""

import json
import logging

import numpy as np
import pytest
import token_cases
from hypothesis import given
from hypothesis import strategies as st

import hyperep
from hyperep.bench.calibrate import fit
from hyperep.bench.counting import CountingPlatform
from hyperep.cli import main
from hyperep.exchange.calibration import (
    CHUNKS,
    Calibration,
    Load,
    choose_chunks,
    default_path,
    fitting,
    read,
    write,
)
from hyperep.loopback import run
from hyperep.moe import GroupedExperts

LOAD = Load(tokens=1000, top_k=2, token_bytes=400, expert_numbers=5000)


def calibration(**changes):
    # Of LOAD the wire takes 100 ms and the arithmetic 60 ms.
    fields = {"platform": "loopback", "device": "cpu", "ranks": 2, "hidden": 1.0, "chunk_ms": 1.0}
    rates = {"bytes_per_ms": LOAD.wire_bytes(2) / 100, "flops_per_ms": LOAD.flops / 60}
    return Calibration(**{**fields, **rates, **changes})


def test_a_load_by_hand():
    # Two ranks: of two choices both stay with 1/4, so 3/4 of the tokens travel, four times, and 12 bytes a choice.
    assert LOAD.wire_bytes(2) == pytest.approx(1000 * 0.75 * (4 * 400 + 12 * 2))
    assert LOAD.flops == 6 * 1000 * 2 * 5000


@pytest.mark.parametrize(
    ("changes", "chunks"),
    [
        ({}, 8),  # 160 - 52.5 + 7, against 160 - 45 + 3 in four
        ({"chunk_ms": 4.0}, 4),
        ({"chunk_ms": 10.0}, 2),
        ({"chunk_ms": 40.0}, 1),
        ({"hidden": 0.0, "chunk_ms": 0.0}, 1),
        ({"hidden": 0.1, "chunk_ms": 0.0}, 1),  # less than a twentieth is no reason
    ],
)
def test_chunks_are_as_many_as_pay(changes, chunks):
    found, reason = choose_chunks(calibration(**changes), LOAD)
    assert found == chunks
    assert "1000 tokens: wire 100 ms, arithmetic 60 ms" in reason


def test_without_a_calibration_there_is_one_chunk_and_a_way_out():
    assert choose_chunks(None, LOAD) == (
        1,
        "1 chunk: nothing was measured here; run hyperep bench --calibrate with these ranks",
    )


@given(st.integers(0, 9))
def test_chunks_are_no_more_than_tokens(tokens):
    found, _ = choose_chunks(calibration(chunk_ms=0.0), Load(**{**vars(LOAD), "tokens": tokens}))
    assert found <= max(tokens, 1)


@given(st.floats(0, 1), st.floats(0, 20), st.floats(1, 500), st.floats(1, 500))
def test_a_fit_finds_what_made_the_times(hidden, chunk_ms, wire, arithmetic):
    times = {n: 1000 - hidden * min(wire, arithmetic) * (1 - 1 / n) + chunk_ms * (n - 1) for n in CHUNKS}
    found = fit(wire, arithmetic, times)
    assert found[0] == pytest.approx(hidden, abs=1e-6)
    assert found[1] == pytest.approx(chunk_ms, abs=1e-6)


def test_a_fit_stays_within_what_is_possible():
    slower = {1: 100.0, 2: 120.0, 4: 130.0, 8: 150.0}
    hidden, chunk_ms = fit(50.0, 50.0, slower)
    assert hidden == 0
    assert chunk_ms > 0
    assert fit(10.0, 50.0, {1: 100.0, 2: 60.0, 4: 50.0, 8: 45.0})[0] == 1


def test_files_are_kept_by_platform_device_and_ranks(tmp_path, monkeypatch):
    path = tmp_path / "there" / "kept.json"
    monkeypatch.setenv("HYPEREP_CALIBRATION", str(path))
    assert default_path() == path
    assert read() == ()
    write([calibration()])
    write([calibration(ranks=4)])
    write([calibration(hidden=0.5)])
    assert read() == (calibration(hidden=0.5), calibration(ranks=4))
    assert fitting(read(), "loopback", "cpu:0", 4) == calibration(ranks=4)
    assert fitting(read(), "torch", "cpu", 4) is None
    assert [p.name for p in path.parent.iterdir()] == ["kept.json"]
    path.write_text('[{"ranks": 2}]')
    with pytest.raises(ValueError, match=r"holds no calibrations .* delete it"):
        hyperep.ExpertParallel(chunks="auto")
    monkeypatch.delenv("HYPEREP_CALIBRATION")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "hyperep" / "calibration.json"


def _calls(platform):
    """How many large exchanges a call makes forward, whose rank with the most tokens has so many; and it is right."""
    token_cases.agrees(platform, "auto", (platform.world_size,))
    counting = CountingPlatform(platform)
    mesh = hyperep.init_device_mesh(counting, (platform.world_size,), ("ep",))
    experts = GroupedExperts(counting, token_cases.DIM, token_cases.HIDDEN, token_cases.EXPERTS)
    hyperep.ExpertParallel(chunks="auto").apply(experts, mesh)
    found = []
    for tokens in (0, 3, 40):
        x, indices, weights, _ = token_cases.routing(platform.rank, tokens=tokens if platform.rank else 0)
        counting.take()
        experts(*(platform.from_host(v) for v in (x.astype(np.float32), indices, weights.astype(np.float32))))
        counts = counting.take()
        assert (counts.host_copies, counts.small) == (1, 1)
        found.append(counts.large // 3)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_chooses_the_same_by_the_tokens_of_the_fullest(tmp_path, monkeypatch, caplog, ranks):
    told = set()
    monkeypatch.setattr("hyperep.exchange.calibration._told", told)
    monkeypatch.setenv("HYPEREP_CALIBRATION", str(tmp_path / "kept.json"))
    monkeypatch.setitem(token_cases.WAYS, "auto", ({"chunks": "auto"}, ("ep",), "ep"))
    assert run(_calls, ranks) == [[1, 1, 1]] * ranks
    write([calibration(ranks=ranks, bytes_per_ms=1e-3, flops_per_ms=1e-2, chunk_ms=0.0)])
    told.clear()
    with caplog.at_level(logging.INFO, "hyperep.exchange"):
        assert run(_calls, ranks) == [[1, 2, 8]] * ranks
    reasons = [record.message for record in caplog.records]
    assert len(reasons) <= 3 * ranks  # once for each number, and not for every call
    assert any(reason.startswith("2 chunks for 3 tokens: wire") for reason in reasons)


@pytest.mark.parametrize("chosen", [1, 2, 4, 8])
def test_parts_that_were_counted_are_joined(tmp_path, monkeypatch, chosen):
    """Counts of joined parts with the bounds of as many that are not."""
    monkeypatch.setenv("HYPEREP_CALIBRATION", str(tmp_path / "kept.json"))
    monkeypatch.setitem(token_cases.WAYS, "auto", ({"chunks": "auto"}, ("ep",), "ep"))
    monkeypatch.setattr("hyperep.exchange.chunks.choose_chunks", lambda calibration, load: (chosen, "by the test"))
    run(lambda platform: token_cases.agrees(platform, "auto", (2,)), 2)


def test_ranks_that_measured_differently_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPEREP_CALIBRATION", str(tmp_path / "kept.json"))

    def apply(platform):
        experts = GroupedExperts(platform, 4, 4, 4)
        style = hyperep.ExpertParallel(chunks="auto")
        if platform.rank == 1:
            style.chunks = type(style.chunks)((calibration(),))
        mesh = hyperep.init_device_mesh(platform, (2,), ("ep",))
        with pytest.raises(ValueError, match="hidden=1"):
            style.apply(experts, mesh)

    run(apply, 2)


def test_the_command_writes_what_the_style_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HYPEREP_CALIBRATION", str(tmp_path / "kept.json"))
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--platform", "loopback", "--calibrate", "--shape", "finest", "--repetitions", "1"])
    assert not ended.value.code
    (found,) = read()
    assert (found.platform, found.device, found.ranks) == ("loopback", "cpu", 2)
    assert found.bytes_per_ms > 0
    assert found.flops_per_ms > 0
    shown = capsys.readouterr().out
    assert "finest on loopback, 2 ranks: wire" in shown
    assert str(tmp_path / "kept.json") in shown.replace("\n", "")
    assert json.loads((tmp_path / "kept.json").read_text())[0]["ranks"] == 2
