# SPDX-License-Identifier: Apache-2.0
"""The counts of a layer on PyTorch, exactly: collectives, copies to the host, tensors kept for backward."""

import os

import bench_counts
import pytest
from bench_counts import SHAPE

from hyperep.exchange.row_input import HEADER


@pytest.fixture(scope="module")
def observed(two):
    return two.run(bench_counts.observe)


def test_one_small_and_two_large_exchanges_forward_and_two_large_backward(observed):
    for found in observed:
        row = SHAPE.dim * 4
        counts = ("all_to_all_single", "torch.int64", 2 * (SHAPE.experts // 2 + HEADER) * 8)
        there = ("all_to_all_single", "torch.float32", SHAPE.rows * row)
        back = ("all_to_all_single", "torch.float32", found["received"] * row)
        assert found["seen"]["forward"] == [counts, there, back]
        assert found["seen"]["backward"] == [there, back]


def test_one_copy_to_the_host_in_forward_and_none_in_backward(observed):
    assert [found["copies"] for found in observed] == [["forward"]] * 2


def test_kept_for_backward_are_the_rows_two_projections_and_indices(observed):
    for found in observed:
        rows, local = found["received"], SHAPE.experts // 2
        indices = [(local,), (rows,), (rows,)]  # where groups end, and the permutation for each of two gathers
        assert found["kept"] == sorted([*indices, (rows, SHAPE.dim), (rows, SHAPE.hidden), (rows, SHAPE.hidden)])


def test_the_profiler_that_finds_the_peak_keeps_quiet(platform, capfd):
    size = platform.instruments.peak_bytes(lambda: (platform.xp.zeros((1000, 256)), print("out"))[0])
    assert size >= 1000 * 256 * 4
    os.write(2, b"heard again")
    assert capfd.readouterr() == ("out\n", "heard again")
