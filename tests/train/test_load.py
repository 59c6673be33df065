# SPDX-License-Identifier: Apache-2.0
"""What a run tells about its load, and the trace that it leaves."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from hyperep.exchange import balanced
from hyperep.exchange.lending import plan_lending
from hyperep.train.recorder import earlier_trace
from hyperep.train.resume import settings_for
from hyperep.workloads import Trace, choices, counts, read_trace, write_trace

pytestmark = pytest.mark.usefixtures("no_pictures")

WAYS = [(1, "ep", 1), (2, "ep", 1), (4, "ep", 1), (4, "etp", 2), (2, "tp", 2), (4, "tp", 2)]


@pytest.mark.parametrize(("ranks", "style", "tp"), WAYS)
def test_figures_are_those_of_the_trace(train, small, ranks, style, tp):
    """The trace knows every token; what the loads say is counted from it anew."""
    settings = small(steps=2, style=style, tp=tp, record_trace=True)
    _, records = train(ranks, settings)
    trace = read_trace(Path(settings.out) / "trace.npz")
    assert trace.choices.shape == (2, settings.layers, settings.batch_tokens, settings.top_k)
    assert (trace.experts, trace.first_step) == (settings.experts, 1)
    parts = ranks // tp
    for record, step in zip(records, trace.choices, strict=True):
        for layer, figures in enumerate(record["load"]):
            chosen = step[layer].reshape(parts, -1)
            assert record["layer_load"][layer] == np.bincount(chosen.ravel(), minlength=4).tolist()
            owner = np.arange(parts)[:, None] if style == "tp" else chosen.astype(int) * parts // settings.experts
            owner = np.broadcast_to(owner, chosen.shape)
            assert figures["rank_rows"] == np.bincount(owner.ravel(), minlength=parts).tolist()
            assert figures["rows_crossed"] == int((owner != np.arange(parts)[:, None]).sum())
            assert (figures["copies"], figures["rows_saved"]) == (0, 0)


@pytest.mark.parametrize(("ranks", "style", "tp"), [(2, "ep", 1), (4, "ep", 1), (4, "etp", 2)])
def test_figures_are_those_of_the_copies_that_layers_make(train, small, monkeypatch, ranks, style, tp):
    made, told = Counter(), Counter()

    def spied(platform, group, placement, rank):
        if rank == 0:
            made[placement.copies, placement.loads] += 1
        return plan_lending(platform, group, placement, rank)

    monkeypatch.setattr(balanced, "plan_lending", spied)
    _, records = train(ranks, small(steps=3, style=style, tp=tp, balance_experts=1, record_trace=True))
    for record in records:
        for figures in record["load"]:
            if figures["copies"]:
                told[figures["copies"], tuple(figures["rank_rows"])] += tp
    # The last forward is that of the checkpoint's check, which no record is of.
    seen = Counter()
    for (copies, loads), times in made.items():
        seen[len(copies), loads] += times
    assert told
    assert not told - seen
    assert (seen - told).total() <= 2 * tp
    assert all(record["load"][0]["rows_saved"] >= 0 for record in records)


def test_the_trace_does_not_depend_on_how_many_ranks_made_it(train, small):
    found = []
    for ranks in (1, 4):
        settings = small(steps=3, record_trace=True)
        train(ranks, settings)
        found.append(read_trace(Path(settings.out) / "trace.npz").choices)
    assert np.array_equal(*found)


def test_a_run_that_goes_on_goes_on_with_its_trace(train, small):
    whole = small(steps=4, record_trace=True)
    train(2, whole)
    first = small(steps=2, record_trace=True)
    train(1, first)
    path = Path(first.out) / "trace.npz"
    two = read_trace(path)
    # As a run leaves it that is killed after the trace was written and before the checkpoint was.
    write_trace(path, Trace(choices=np.concatenate([two.choices, two.choices[:1]]), experts=4))
    train(2, settings_for({"steps": 4}, first.out))
    assert np.array_equal(read_trace(path).choices, read_trace(Path(whole.out) / "trace.npz").choices)
    train(2, settings_for({"steps": 5, "record_trace": False}, first.out))
    assert len(read_trace(path).choices) == 4


def test_a_trace_that_cannot_be_continued_begins_anew(train, small):
    settings = small(steps=2)
    train(1, settings)
    assert not (Path(settings.out) / "trace.npz").exists()
    train(1, settings_for({"steps": 4, "record_trace": True}, settings.out))
    found = read_trace(Path(settings.out) / "trace.npz")
    assert (found.first_step, len(found.choices)) == (3, 2)
    assert earlier_trace(Path(settings.out), last_step=4, tokens=settings.batch_tokens) is not None
    for other in (
        {"last_step": 5, "tokens": settings.batch_tokens},
        {"last_step": 4, "tokens": 8},
        {"last_step": 2, "tokens": 128},
    ):
        assert earlier_trace(Path(settings.out), **other) is None


def test_the_trace_of_another_run_is_replaced_with_it(train, small):
    settings = small(steps=1, record_trace=True)
    train(1, settings)
    train(1, small(steps=1, out=settings.out, overwrite=True))
    assert not (Path(settings.out) / "trace.npz").exists()


def test_a_recorded_trace_is_a_workload(train, small):
    settings = small(steps=2, record_trace=True)
    _, records = train(2, settings)
    trace = read_trace(Path(settings.out) / "trace.npz")
    sizes = {"tokens": settings.batch_tokens // 2, "experts": 4, "top_k": 2, "ranks": 2, "trace": trace}
    assert choices("trace", **sizes, rank=1).shape == (64, 2)
    for step, record in enumerate(records):
        for layer, load in enumerate(record["layer_load"]):
            assert counts("trace", **sizes, step=step, seed=layer).sum(axis=0).tolist() == load
