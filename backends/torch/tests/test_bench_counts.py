# SPDX-License-Identifier: Apache-2.0
"""The counts of a layer on PyTorch, exactly: collectives, copies to the host, tensors kept for backward."""

import os

import bench_counts
import pytest
from bench_counts import SHAPE

from hyperep.exchange import row_input, token_input

FLOAT = "torch.float32"
ROW, WEIGHTS = SHAPE.dim * 4, SHAPE.top_k * 4
"""Bytes of a row, or token, and of a token's weights."""


@pytest.fixture(scope="module", params=["tokens", "rows"])
def observed(request, two):
    return request.param, two.run(bench_counts.observe, request.param)


def test_exchanges_of_a_layer(observed):
    exchange, ranks = observed
    for found in ranks:
        if exchange == "rows":
            counts, there, back = 2 * (SHAPE.experts // 2 + row_input.HEADER) * 8, SHAPE.rows * ROW, found["rows"] * ROW
            forward, backward = [there, back], [there, back]
        else:
            counts = 2 * token_input.HEADER * 8
            sent, received = found["sent"], found["received"]
            # Numbers and weights of choices, the tokens, sums; their gradients, and those of the weights.
            forward = [sent * 2 * WEIGHTS, sent * ROW, received * ROW]
            backward = [sent * ROW, received * ROW, received * WEIGHTS]
        called = [("all_to_all_single", FLOAT, size) for size in (*forward, *backward)]
        assert found["seen"]["forward"] == [("all_to_all_single", "torch.int64", counts), *called[: len(forward)]]
        assert found["seen"]["backward"] == called[len(forward) :]


def test_one_copy_to_the_host_in_forward_and_none_in_backward(observed):
    assert [found["copies"] for found in observed[1]] == [["forward"]] * 2


def test_what_is_kept_for_backward(observed):
    exchange, ranks = observed
    for found in ranks:
        rows, local = found["rows"], SHAPE.experts // 2
        experts = [
            (rows, SHAPE.dim),
            (rows, SHAPE.hidden),
            (rows, SHAPE.hidden),
            (local,),
        ]  # the last: where groups end
        if exchange == "tokens":
            # What the experts made, to weight it where they are; the weights, and where each row belongs.
            merge = [(rows, SHAPE.dim), (found["received"], SHAPE.top_k), (found["received"], SHAPE.top_k), (rows,)]
        else:
            # The same where the tokens are; and a permutation for each of two gathers.
            merge = [(SHAPE.rows, SHAPE.dim), (SHAPE.tokens, SHAPE.top_k), (SHAPE.tokens, SHAPE.top_k), (SHAPE.rows,)]
            merge += [(rows,), (rows,)]
        assert found["kept"] == sorted([*experts, *merge])


def test_the_profiler_that_finds_the_peak_keeps_quiet(platform, capfd):
    size = platform.instruments.peak_bytes(lambda: (platform.xp.zeros((1000, 256)), print("out"))[0])
    assert size >= 1000 * 256 * 4
    os.write(2, b"heard again")
    assert capfd.readouterr() == ("out\n", "heard again")
