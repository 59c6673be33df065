# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine between ranks, and their errors. Runs on every platform."""

import numpy as np
import pytest
from measure import counted, fill_weights, relative, rows

import hyperep
from hyperep.moe import MoE

EXPERTS, DIM = 4, 3
COLLECTIVES = ("all_to_all_single", "differentiable_all_to_all_single", "all_reduce", "all_gather", "broadcast")


def _mesh(platform):
    return hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",))


def _counts(platform, seed, experts=EXPERTS):
    """Counts that differ between ranks; of the third seed nobody sends anything, of the fourth all go to one expert."""
    counts = np.random.default_rng(10 * seed + platform.rank).integers(0, 4, size=experts)
    if seed == 2:
        counts[:] = 0
    if seed == 3:
        counts = np.array([5 + platform.rank, *[0] * (experts - 1)])
    return counts


def rows_arrive_where_they_should(platform, experts=EXPERTS):
    """Rows carry (rank, expert, number): each arrives at its expert's owner, expert-major, and comes back."""
    mesh = _mesh(platform)
    local = experts // platform.world_size
    for seed in range(4):
        counts = _counts(platform, seed, experts)
        sent = [(platform.rank, e, n) for e in range(experts) for n in range(counts[e])]
        x = platform.from_host(np.array(sent, dtype=np.float32).reshape(-1, 3))
        received, per_expert, context = hyperep.dispatch(x, platform.from_host(counts), mesh)
        everyone = platform.to_host(platform.all_gather(platform.from_host(counts)))[0].reshape(-1, experts)
        mine = range(platform.rank * local, (platform.rank + 1) * local)
        expected = [[r, e, n] for e in mine for r in range(platform.world_size) for n in range(everyone[r, e])]
        got, got_counts = platform.to_host(received, per_expert)
        assert got.tolist() == expected
        assert (
            got_counts.tolist() == list(context.tokens_per_local_expert) == everyone[:, list(mine)].sum(axis=0).tolist()
        )
        assert got_counts.dtype == np.int64
        back = platform.to_host(hyperep.combine(received, context))[0]
        assert back.tolist() == [list(row) for row in sent]


def one_host_copy_per_dispatch(platform):
    """One host copy and two exchanges in dispatch, one exchange in combine, two in backward, and nothing else."""
    mesh, counts = _mesh(platform), _counts(platform, 0)
    rows_count = int(counts.sum())
    on_device = platform.from_host(counts)

    with counted(platform, "to_host", *COLLECTIVES) as calls:

        def there_and_back(x):
            received, _, context = hyperep.dispatch(x, on_device, mesh, num_experts=EXPERTS)
            dispatched.append(dict(calls))
            return hyperep.combine(2.0 * received, context)

        dispatched = []
        _, pullback = platform.vjp(there_and_back, platform.from_host(rows(platform.rank, rows_count, DIM)))
        forward = dict(calls)
        (gradient,) = pullback(platform.from_host(np.ones((rows_count, DIM), np.float32)))
        backward = dict(calls)
    assert dispatched[0]["to_host"] == 1
    assert forward["to_host"] == 1, "combine copies nothing"
    assert backward["to_host"] == 1, "backward copies nothing"
    assert dispatched[0]["differentiable_all_to_all_single"] == 1
    assert forward["differentiable_all_to_all_single"] == 2
    unused = ("all_reduce", "all_gather", "broadcast")
    assert not any(backward.get(name) for name in unused)
    assert np.array_equal(platform.to_host(gradient)[0], np.full((rows_count, DIM), 2, np.float32))


def two_dispatches_in_flight(platform):
    """Micro-batches A and B: dispatch A, dispatch B, combine B, combine A; values and gradients of each are its own."""
    mesh = _mesh(platform)
    counts = [_counts(platform, seed) for seed in (0, 1)]
    inputs = [rows(10 * platform.rank + seed, int(c.sum()), DIM) for seed, c in enumerate(counts)]
    cotangents = [rows(500 + 10 * platform.rank + seed, int(c.sum()), DIM) for seed, c in enumerate(counts)]

    def function(a, b):
        a, _, context_a = hyperep.dispatch(a, platform.from_host(counts[0]), mesh)
        b, _, context_b = hyperep.dispatch(b, platform.from_host(counts[1]), mesh)
        b = hyperep.combine(3.0 * b, context_b)
        return hyperep.combine(2.0 * a, context_a), b

    (a, b), pullback = platform.vjp(function, *map(platform.from_host, inputs))
    grad_a, grad_b = pullback(*map(platform.from_host, cotangents))
    for factor, got, wanted in (
        (2, a, inputs[0]),
        (3, b, inputs[1]),
        (2, grad_a, cotangents[0]),
        (3, grad_b, cotangents[1]),
    ):
        assert np.allclose(platform.to_host(got)[0], factor * wanted, rtol=1e-6)


def recompute_repeats_everything_alike(platform):
    """Activation recompute: same output and gradients; statistics are values, so a token is counted once."""
    layer = MoE(platform, 6, 5, EXPERTS, 2)
    fill_weights(platform, layer)
    hyperep.ExpertParallel().apply(platform.named_modules(layer)["experts"], _mesh(platform))
    handles = list(platform.parameters(layer).values())
    x, cotangent = platform.from_host(rows(platform.rank, 8, 6)), platform.from_host(rows(70 + platform.rank, 8, 6))
    out, pullback = platform.vjp(layer, x, parameters=handles)
    expected = platform.to_host(out, *pullback(cotangent))
    seen, parameter_gradients = [], []

    def forward(x):
        out, stats = layer(x, with_stats=True)
        seen.append(stats.tokens_per_expert)
        return out, (x,)

    def backward(residuals, cotangents, needed):
        def again(x):
            out, stats = layer(x, with_stats=True)
            seen.append(stats.tokens_per_expert)
            return out

        gradient, *rest = platform.vjp(again, *residuals, parameters=handles)[1](*cotangents)
        parameter_gradients.extend(rest)
        return (gradient,)

    out, pullback = platform.vjp(platform.custom_vjp(forward, backward), x)
    (gradient,) = pullback(cotangent)
    for value, wanted in zip(platform.to_host(out, gradient, *parameter_gradients), expected, strict=True):
        assert relative(value, wanted) < 1e-6
    first, second = platform.to_host(*seen)
    assert first.tolist() == second.tolist()
    assert first.sum() == 16


BAD_INPUT = {
    "wrong length": (ValueError, r"rank 1: tokens_per_expert has 3 entries, but num_experts=4"),
    "two dims": (ValueError, r"rank 1: tokens_per_expert has 2 dims, but num_experts=4"),
    "negative": (ValueError, r"rank 1: tokens_per_expert holds -2; counts cannot be negative"),
    "sum": (ValueError, r"rank 1: tokens_per_expert sums to 5 but there are 4 rows"),
    "float counts": (TypeError, r"rank 1: tokens_per_expert must hold int32 or int64 counts; cast it"),
    "no dims": (ValueError, r"rank 1: rows has no dims"),
    "another size": (ValueError, r"rank 1: a row is 6 x float32, but on rank 0 it is 3 x float32"),
    "another dtype": (ValueError, r"rank 1: a row is 3 x int32, but on rank 0 it is 3 x float32"),
    "another dtype of no rows": (ValueError, r"rank 1: a row is 3 x int32, but on rank 0 it is 3 x float32"),
    "foreign rows": (TypeError, r"rank 1: .* must be tensors of platform '\w+'; .*from_host"),
    "foreign counts": (TypeError, r"rank 1: .* must be tensors of platform '\w+'; .*from_host"),
}


def bad_input_on_one_rank_raises_on_all(platform, which):
    """Rank 1 is wrong, every rank raises the same error, and the next dispatch works."""
    mesh = _mesh(platform)
    kind, message = BAD_INPUT[which]
    good = np.array([1, 1, 1, 1])
    bad = {
        "wrong length": np.array([1, 1, 2]),
        "two dims": np.array([[1, 1], [1, 1]]),
        "negative": np.array([3, 3, -2, 0]),
        "sum": np.array([2, 1, 1, 1]),
        "float counts": good.astype(np.float32),
    }
    x, counts = platform.from_host(rows(platform.rank, 4, DIM)), platform.from_host(good)
    if platform.rank == 1:
        counts = platform.from_host(bad[which]) if which in bad else counts
        bad_rows = {
            "no dims": np.float32(1.0),
            "another size": np.ones((4, 2, DIM), np.float32),
            "another dtype": np.ones((4, DIM), np.int32),
            "another dtype of no rows": np.ones((0, DIM), np.int32),
        }
        x = platform.from_host(np.asarray(bad_rows[which])) if which in bad_rows else x
        x = [[1.0, 2.0, 3.0]] * 4 if which == "foreign rows" else x
        counts = platform.from_host(0 * good) if which == "another dtype of no rows" else counts
        counts = (1, 1, 1, 1) if which == "foreign counts" else counts
    with pytest.raises(kind, match=message) as raised:
        hyperep.dispatch(x, counts, mesh, num_experts=EXPERTS)
    # What all ranks know, all say; the name of a type only its rank can add.
    assert ("is a builtins." in str(raised.value)) == (platform.rank == 1 and which.startswith("foreign"))
    received, _, context = hyperep.dispatch(platform.from_host(rows(0, 4, DIM)), platform.from_host(good), mesh)
    assert hyperep.combine(received, context).shape == (4, DIM)


def combine_wants_as_many_rows(platform):
    """An expert that loses a row is told so; checked before the exchange, on the rank where it happens."""
    received, _, context = hyperep.dispatch(
        platform.from_host(rows(0, 4, DIM)), platform.from_host(np.array([1, 1, 1, 1])), _mesh(platform)
    )
    with pytest.raises(ValueError, match="combine got 3 rows but the dispatch delivered 4"):
        hyperep.combine(received[1:], context)
