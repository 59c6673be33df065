# SPDX-License-Identifier: Apache-2.0
"""Traces: as values, as files, and as a workload."""

import re

import numpy as np
import pytest

from hyperep.workloads import Trace, choices, counts, read_trace, recorded, write_trace

DRAWN = np.random.default_rng(3).random((3, 2, 12, 8)).argsort(axis=3)[..., :2].astype(np.uint8)  # [S, layers, T, K]
TRACE = Trace(choices=DRAWN, experts=8, first_step=5)


@pytest.mark.parametrize(("experts", "dtype"), [(256, np.uint8), (257, np.uint16)])
def test_a_trace_is_what_was_written(tmp_path, experts, dtype):
    given = DRAWN.astype(np.uint32)
    given[-1, -1, -1, -1] = experts - 1
    write_trace(tmp_path / "run.trace", Trace(choices=given, experts=experts, first_step=7))
    found = read_trace(tmp_path / "run.trace")
    assert np.array_equal(found.choices, given)
    assert (found.choices.dtype, found.experts, found.first_step) == (dtype, experts, 7)


def test_counts_are_those_of_each_step_and_layer():
    assert TRACE.counts.shape == (3, 2, 8)
    assert TRACE.counts[2, 1].tolist() == [int((DRAWN[2, 1] == expert).sum()) for expert in range(8)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_out_the_tokens_of_a_recorded_step(ranks):
    call = {"tokens": 12 // ranks, "experts": 8, "top_k": 2, "ranks": ranks, "trace": TRACE}
    parts = [choices("trace", **call, rank=rank, step=1, seed=1) for rank in range(ranks)]
    assert np.array_equal(np.concatenate(parts), DRAWN[1, 1])
    assert np.array_equal(counts("trace", **call, step=1, seed=1).sum(axis=0), TRACE.counts[1, 1])


def test_steps_layers_and_tokens_go_round():
    found = choices("trace", tokens=9, experts=8, top_k=2, ranks=2, rank=1, step=3, seed=2, trace=TRACE)
    part = DRAWN[0, 0, 6:]
    assert np.array_equal(found, np.concatenate([part, part[:3]]))


def test_a_trace_of_other_sizes_is_an_error_that_tells_how_to_get_one():
    with pytest.raises(ValueError, match=r"of 8 experts and top-2, not of 16 and top-3; .*--experts 16 --top-k 3"):
        choices("trace", tokens=4, experts=16, top_k=3, ranks=1, rank=0, trace=TRACE)
    with pytest.raises(ValueError, match="12 tokens a step, which are too few for 16 ranks"):
        Trace(choices=DRAWN, experts=16).part(0, 16, 4, experts=16, top_k=2)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"choices": DRAWN, "first_step": 1}, "experts is not a file"),
        ({"choices": DRAWN.astype(int), "experts": 8, "first_step": 1}, r"these are int64 \[3, 2, 12, 2\]"),
        ({"choices": DRAWN[:0], "experts": 8, "first_step": 1}, r"and some; these are uint8 \[0, 2, 12, 2\]"),
        ({"choices": DRAWN, "experts": 7, "first_step": 1}, "names expert 7, but has experts=7"),
        (None, "is no trace of hyperep train --record-trace"),
    ],
)
def test_a_file_that_is_no_trace_is_an_error(tmp_path, arrays, message):
    path = tmp_path / "trace.npz"
    if arrays is None:
        path.write_bytes(b"something else")
    else:
        np.savez(path, **arrays)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + message):
        read_trace(path)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 6), (128, 8)])
def test_traces_that_come_along_are_uneven_and_have_distinct_experts(experts, top_k):
    trace = recorded(experts, top_k)
    assert (trace.choices.shape, trace.experts) == ((4, 2, 1024, top_k), experts)
    in_order = np.sort(trace.choices, axis=3)
    assert (in_order[..., 1:] > in_order[..., :-1]).all()
    loads = trace.counts
    assert (loads.max(axis=2) > 1.3 * loads.mean(axis=2)).all()


def test_sizes_that_no_trace_comes_along_for_are_an_error_that_tells_how_to_get_one():
    with pytest.raises(ValueError, match=r"only for 128 experts with top-8 and 64 .*--experts 9 --top-k 3"):
        choices("trace", tokens=4, experts=9, top_k=3, ranks=3, rank=0)
