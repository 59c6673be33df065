# SPDX-License-Identifier: Apache-2.0
"""What a layer moves, exactly: copies to the host, exchanges, bytes."""

import numpy as np
import pytest

from hyperep.bench import theory
from hyperep.bench.counting import nbytes
from hyperep.bench.program import count, run
from hyperep.bench.shapes import Shape
from hyperep.exchange.row_input import HEADER
from hyperep.loopback import run as on_ranks

SMALL = Shape(name="small", tokens=24, dim=6, hidden=10, experts=8, top_k=3)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("hot", [0.0, 0.9, 1.0])
def test_copies_collectives_and_bytes(ranks, hot):
    shape = Shape(**{**vars(SMALL), "hot": hot})
    (found, *others) = on_ranks(lambda platform: count(platform, shape), ranks)
    assert found["host_copies"] == 1
    assert found["collectives"] == {"forward": {"small": 1, "large": 2}, "backward": {"small": 0, "large": 2}}
    assert found["wire_bytes"] == found["wire_bytes_theory"]
    assert all(other == found for other in others)
    assert (found["wire_bytes"] == 0) == (ranks == 1)


def test_theory_by_hand():
    # Two ranks of two experts; rank 0 sends 3 + 4 rows to rank 1, and rank 1 sends 5 + 6 rows to rank 0.
    counts = np.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]])
    rows = 4 * (3 + 4 + 5 + 6) * 20  # there and back, and the gradients there and back
    assert theory.wire_bytes(counts, 20) == rows + 2 * (2 + HEADER) * 8


def test_kept_for_backward_is_what_the_defaults_keep():
    (found, _) = on_ranks(lambda platform: run(platform, [vars(SMALL)], repetitions=1, naive=False), 2)
    received = SMALL.all_counts(2)[:, 0].sum()
    # Rows, two projections and the hidden rows, in float32; three times where groups end is not kept in tensors.
    assert found[0]["saved_bytes"] == received * (SMALL.dim + 3 * SMALL.hidden) * 4


def test_size_of_a_tensor():
    assert nbytes(np.zeros((3, 4), dtype=np.float32)) == 48
    assert nbytes(np.zeros((0, 4), dtype=np.int64)) == 0
