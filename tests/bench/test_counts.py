# SPDX-License-Identifier: Apache-2.0
"""What a layer moves, exactly: copies to the host, exchanges, bytes."""

import numpy as np
import pytest

from hyperep.bench import theory
from hyperep.bench.counting import nbytes
from hyperep.bench.limit import Limit
from hyperep.bench.program import count, run
from hyperep.bench.shapes import Shape
from hyperep.bench.way import Way
from hyperep.exchange import row_input, token_input
from hyperep.loopback import run as on_ranks
from hyperep.mesh import init_device_mesh
from hyperep.workloads import NAMES, Trace, write_trace

SMALL = Shape(name="small", tokens=24, dim=6, hidden=10, experts=8, top_k=3)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("hot", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("exchange", ["tokens", "rows"])
def test_copies_collectives_and_bytes(exchange, ranks, hot):
    shape = Shape(**{**vars(SMALL), "hot": hot})
    (found, *others) = on_ranks(lambda platform: count(platform, shape, Way(exchange=exchange)), ranks)
    assert found["host_copies"] == 1
    forward, backward = {"rows": (2, 2), "tokens": (3, 3) if ranks > 1 else (0, 0)}[exchange]
    assert found["collectives"] == {
        "forward": {"small": 1, "large": forward},
        "backward": {"small": 0, "large": backward},
    }
    assert found["wire_bytes"] == found["wire_bytes_theory"]
    assert all(other == found for other in others)
    assert (found["wire_bytes"] == 0) == (ranks == 1)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("workload", NAMES)
def test_every_workload_moves_what_it_must(tmp_path, workload, ranks):
    drawn = np.random.default_rng(4).random((2, 1, 30, 8)).argsort(axis=3)[..., :3].astype(np.uint8)
    write_trace(tmp_path / "trace.npz", Trace(choices=drawn, experts=8))
    trace = str(tmp_path / "trace.npz") if workload == "trace" else None
    shape = Shape(**{**vars(SMALL), "workload": workload, "trace": trace, "shared": 1})
    found = on_ranks(lambda platform: run(platform, [vars(shape)], repetitions=1, naive=False), ranks)[0][0]
    assert found["workload"] == workload
    assert found["host_copies"] == 1
    assert found["wire_bytes"] == found["wire_bytes_theory"]
    idle = workload == "idle-rank" and ranks > 1
    assert shape.counts(ranks).sum() == (ranks - idle) * 72
    crossing = shape.copies(ranks)
    np.fill_diagonal(crossing, 0)
    assert (found["wire_bytes"] > 0) == (ranks > 1)
    assert crossing.any() == (ranks > 1)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("workload", ["uniform", "zipf", "hot-expert", "hot-rank", "idle-rank"])
def test_copies_move_tokens_elsewhere_and_weights_and_nothing_else(workload, ranks):
    shape = Shape(**{**vars(SMALL), "workload": workload})
    found = on_ranks(
        lambda platform: run(platform, [vars(shape)], repetitions=1, naive=False, way={"balance": True}), ranks
    )[0][0]
    assert found["host_copies"] == (2 if ranks > 1 else 1)
    assert found["wire_bytes"] == found["wire_bytes_theory"]
    assert found["speedup_over_plain"] == pytest.approx(found["plain_ms"] / found["forward_backward_ms"])
    plain = on_ranks(lambda platform: count(platform, shape), ranks)[0]
    if workload == "hot-expert" and ranks > 1:
        assert found["load"]["copies"] > 0
        assert found["load"]["rank_max_over_mean"] < 1.3
        assert found["wire_bytes"] != plain["wire_bytes"]
    if workload == "uniform":
        assert found["load"]["copies"] == 0
        assert found["wire_bytes"] == plain["wire_bytes"]


def test_the_limit_multiplies_the_rows_where_copies_are():
    shape = Shape(**{**vars(SMALL), "workload": "hot-expert"})
    placement = Way(balance=True).placement(shape, 2)

    def on_rank(platform):
        mesh = init_device_mesh(platform, (2,), ("ep",))
        return [len(Limit(mesh, shape, of).products[0].x) for of in (None, placement)]

    (plain_0, balanced_0), (plain_1, balanced_1) = on_ranks(on_rank, 2)
    assert (plain_0, plain_1) == placement.before
    assert (balanced_0, balanced_1) == placement.loads
    assert plain_0 > balanced_0


@pytest.mark.parametrize("ranks", [2, 4])
def test_chunks_cost_two_counts_each(ranks):
    whole, parts = (
        on_ranks(lambda platform, chunks=chunks: count(platform, SMALL, Way(chunks=chunks)), ranks)[0]
        for chunks in (1, 3)
    )
    assert parts["host_copies"] == 1
    assert parts["collectives"]["forward"] == {"small": 1, "large": 9}
    assert parts["collectives"]["backward"] == {"small": 0, "large": 9}
    assert parts["wire_bytes"] == parts["wire_bytes_theory"] == whole["wire_bytes"] + ranks * (ranks - 1) * 2 * 2 * 8


def test_theory_of_rows_by_hand():
    # Two ranks of two experts; rank 0 sends 3 + 4 rows to rank 1, and rank 1 sends 5 + 6 rows to rank 0.
    counts = np.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]])
    rows = 4 * (3 + 4 + 5 + 6) * 20  # there and back, and the gradients there and back
    assert theory.row_wire_bytes(counts, 20) == rows + 2 * (2 + row_input.HEADER) * 8


def test_theory_of_tokens_by_hand():
    # Rank 0 sends 3 tokens to rank 1, and rank 1 sends 5 to rank 0; each has six choices.
    copies = np.array([[2, 3], [5, 4]])
    tokens = 4 * (3 + 5) * 20  # there and back, and the gradients there and back
    choices = (3 + 5) * 6 * (4 + 4 + 4)  # a number and a weight there, and the weight's gradient back
    assert theory.token_wire_bytes(copies, 6, 20) == tokens + choices + 2 * token_input.HEADER * 8


def test_what_goes_with_a_token_is_little():
    # 2 bytes a number, 2048 of them, eight experts a token: within 2 % of what the tokens and sums are.
    plain, eight = (theory.token_wire_bytes(np.array([[0, 1000], [0, 0]]), top_k, 4096) for top_k in (0, 8))
    assert 1 < eight / plain < 1.02


@pytest.mark.parametrize("hot", [False, True])
def test_kept_for_backward_is_what_the_defaults_keep(hot):
    shape = Shape(**{**vars(SMALL), "workload": "hot-rank" if hot else "uniform"})
    (found, _) = on_ranks(lambda platform: run(platform, [vars(shape)], repetitions=1, naive=False), 2)
    rows, tokens = shape.counts(2).sum(axis=(0, 2)), shape.copies(2).sum(axis=0)
    # Of a row: itself, two projections, the hidden row and the output, in float32; and of a token that arrived its
    # weights. Three times where groups end is not kept in tensors. On the rank that keeps most.
    assert found[0]["saved_bytes"] == max(rows * (2 * SMALL.dim + 3 * SMALL.hidden) + tokens * SMALL.top_k) * 4


def test_size_of_a_tensor():
    assert nbytes(np.zeros((3, 4), dtype=np.float32)) == 48
    assert nbytes(np.zeros((0, 4), dtype=np.int64)) == 0
