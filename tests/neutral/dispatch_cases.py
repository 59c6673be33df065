# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine between ranks, and their errors. Runs on every platform."""

import numpy as np
import pytest
from measure import counted, fill_weights, relative, rows

import hyperep
from hyperep.exchange.rows import ROOM
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


def a_style_copies_once_for_any_number_of_experts(platform):
    """Ranks that agreed on the experts when the style was applied need no second copy, as a dispatch alone would."""
    experts = platform.world_size * (ROOM + 2)
    module = platform.make_module(
        "Experts", {"w": platform.from_host(rows(3, experts, 1))}, lambda m, x, counts: 2.0 * x
    )
    mesh = _mesh(platform)
    hyperep.ExpertParallel().apply(module, mesh)
    counts = platform.from_host(_counts(platform, 0, experts))
    x = platform.from_host(rows(platform.rank, int(_counts(platform, 0, experts).sum()), DIM))
    with counted(platform, "to_host", "all_to_all_single") as calls:
        module(x, counts)
        assert calls["to_host"] == 1
        hyperep.dispatch(x, counts, mesh)
        assert calls["to_host"] == (2 if platform.world_size == 1 else 3)


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
    "two dims": (ValueError, r"rank 1: tokens_per_expert has 2 dims; give one count for each expert, as in \[E\]"),
    "negative": (ValueError, r"rank 1: tokens_per_expert holds -2; counts cannot be negative"),
    "sum": (ValueError, r"rank 1: tokens_per_expert sums to 5 but there are 4 rows"),
    "float counts": (TypeError, r"rank 1: tokens_per_expert must hold int32 or int64 counts; cast it"),
    "no dims": (ValueError, r"rank 1: rows has no dims"),
    "another size": (ValueError, r"rank 1: a row is 6 x float32, but on rank 0 it is 3 x float32"),
    "another dtype": (ValueError, r"rank 1: a row is 3 x int32, but on rank 0 it is 3 x float32"),
    "another dtype of no rows": (ValueError, r"rank 1: a row is 3 x int32, but on rank 0 it is 3 x float32"),
    "foreign rows": (TypeError, r"rank 1: .* must be tensors of platform '\w+', dense and on its device .*from_host"),
    "foreign counts": (TypeError, r"rank 1: .* must be tensors of platform '\w+', dense and on its device .*from_host"),
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


DISAGREEMENTS = {
    "counts too long": (
        ValueError,
        r"rank 1: the number of experts is 8, but on rank 0 it is 4; it is num_experts, or",
    ),
    "one count too many": (
        ValueError,
        r"rank 1: num_experts=5 is not divisible by the \d ranks of .*; choose a number",
    ),
    "a list": (TypeError, r"rank 1: .* must be tensors of platform '\w+', dense and on its device .*from_host"),
    "another num_experts": (
        ValueError,
        r"rank 1: the number of experts is 8, but on rank 0 it is 4; it is num_experts",
    ),
    "no whole number": (TypeError, r"rank 1: num_experts must be a whole number, 0 or more; leave it out"),
    "a negative number": (TypeError, r"rank 1: num_experts must be a whole number, 0 or more; leave it out"),
}


def disagreement_on_experts_raises_on_all(platform, which):
    """Ranks that disagree on how many experts there are send messages of one length, and all hear of it."""
    mesh = _mesh(platform)
    kind, message = DISAGREEMENTS[which]
    good = platform.from_host(np.array([1, 1, 1, 1]))
    counts, experts = good, None
    if platform.rank == 1:
        long = platform.from_host(np.array([1, 1, 1, 1, 0, 0, 0, 0]))
        counts, experts = {
            "counts too long": (long, None),
            "one count too many": (long[:5], None),
            "a list": ([1, 1, 1, 1], None),
            "another num_experts": (long, 8),
            "no whole number": (good, 4.0),
            "a negative number": (good, -4),
        }[which]
    x = platform.from_host(rows(platform.rank, 4, DIM))
    with pytest.raises(kind, match=message):
        hyperep.dispatch(
            x, counts, mesh, num_experts=4 if which == "another num_experts" and experts is None else experts
        )
    # A number on some ranks, and its absence on the others, mean the same.
    received, _, context = hyperep.dispatch(x, good, mesh, num_experts=EXPERTS if platform.rank else None)
    assert hyperep.combine(received, context).shape == (4, DIM)


def errors_name_world_ranks(platform):
    """In a group that does not begin with rank 0 an error names the rank, not its place; other groups go on."""
    mesh = hyperep.init_device_mesh(platform, (2, 2), ("dp", "ep"))["ep"]
    good = platform.from_host(np.array([1, 1, 1, 1]))
    wrong = platform.from_host(np.array([1, 1, 1, 2]))
    narrow = platform.from_host(rows(platform.rank, 4, DIM - 1))
    x = platform.from_host(rows(platform.rank, 4, DIM))
    for counts, given, message in (
        (wrong, x, r"^dispatch on rank 3: tokens_per_expert sums to 5 but there are 4 rows"),
        (good, narrow, r"^dispatch on rank 3: a row is 2 x float32, but on rank 2 it is 3 x float32"),
    ):
        faulty = platform.rank == 3

        def attempt(faulty=faulty, counts=counts, given=given):
            return hyperep.dispatch(given if faulty else x, counts if faulty else good, mesh)

        if platform.rank < 2:
            attempt()
        else:
            with pytest.raises(ValueError, match=message):
                attempt()


def _dispatched(platform, dtype=np.float32):
    counts = platform.from_host(np.array([1, 1, 1, 1]))
    return hyperep.dispatch(platform.from_host(rows(platform.rank, 4, DIM).astype(dtype)), counts, _mesh(platform))


NOT_COMBINED = {
    "too few rows": (
        ValueError,
        r"combine on rank \d: got 3 rows but the dispatch delivered 4; .* one row for each row",
    ),
    "too many rows": (ValueError, r"combine on rank \d: got 8 rows but the dispatch delivered 4; .* one row for each"),
    "no dims": (ValueError, r"combine on rank \d: got no rows but the dispatch delivered 4"),
    "wider rows": (
        ValueError,
        r"combine on rank \d: a row has shape \(6,\) but the dispatch says \(3,\); rows go back",
    ),
    "rows of no dims": (ValueError, r"combine on rank \d: a row has shape \(\) but the dispatch says \(3,\)"),
    "not as told": (ValueError, r"combine on rank \d: a row has shape \(3,\) but row_shape says \(6,\)"),
    "integers": (
        ValueError,
        r"combine on rank \d: rows are .*[Ii]nt32.* but the dispatch says .*[Ff]loat32.*; return that",
    ),
    "a list": (
        TypeError,
        r"combine on rank \d: rows is a builtins.list, but must be a tensor of platform '\w+', dense",
    ),
    "no context": (TypeError, r"combine\(context=None\): give the context that dispatch returned, its third value"),
}


def combine_refuses(platform, which):
    """What experts must not return is told on the rank where it happens, before anything is exchanged."""
    received, _, context = _dispatched(platform)
    xp = platform.xp
    returned = {
        "too few rows": received[1:],
        "too many rows": xp.concat([received, received], axis=0),
        "no dims": received[0, 0],
        "wider rows": xp.concat([received, received], axis=1),
        "rows of no dims": received[:, 0],
        "integers": xp.astype(received, xp.int32),
        "a list": [[1.0] * DIM] * 4,
    }.get(which, received)
    kind, message = NOT_COMBINED[which]
    keywords = {"row_shape": (2 * DIM,)} if which == "not as told" else {}
    with pytest.raises(kind, match=message):
        hyperep.combine(returned, None if which == "no context" else context, **keywords)
    back = platform.to_host(hyperep.combine(received, context))[0]
    assert np.array_equal(back, rows(platform.rank, 4, DIM))


def combine_takes_what_it_is_told(platform):
    """Rows of another shape, and of a dtype that is narrower on one rank only, come back exactly, with gradients."""
    received, _, context = _dispatched(platform)
    wide = platform.xp.concat([received, 2.0 * received], axis=1)
    back = platform.to_host(hyperep.combine(wide, context, row_shape=[2 * DIM]))[0]
    mine = rows(platform.rank, 4, DIM)
    assert np.array_equal(back, np.concatenate([mine, 2 * mine], axis=1))
    xp = platform.xp
    if not hasattr(xp, "float64"):
        return
    received, _, context = _dispatched(platform, np.float64)
    narrow = xp.float32 if platform.rank == 1 else xp.float64

    def function(x):
        return hyperep.combine(xp.astype(x, narrow), context)

    out, pullback = platform.vjp(function, received)
    (gradient,) = pullback(xp.astype(platform.from_host(rows(50 + platform.rank, 4, DIM)), narrow))
    out, gradient, weights = platform.to_host(out, gradient, received)
    assert out.dtype == (np.float32 if platform.rank == 1 else np.float64)
    assert np.array_equal(out, mine)
    assert gradient.dtype == weights.dtype == np.float64
    total = platform.all_gather(platform.from_host(np.array([(gradient * weights).sum()])))
    wanted = [(rows(50 + r, 4, DIM).astype(np.float64) * rows(r, 4, DIM)).sum() for r in range(platform.world_size)]
    assert abs(platform.to_host(total)[0].sum() / np.sum(wanted) - 1) < 1e-6


def experts_that_break_the_contract_on_one_rank(platform):
    """Rank 1 returns rows of another width, and the others wait for it: whoever runs them ends them."""
    received, _, context = _dispatched(platform)
    wide = platform.xp.concat([received, received], axis=1)
    return hyperep.combine(wide if platform.rank == 1 else received, context)


def all_bad_input(platform):
    """Every case of bad input, one after the other: the ranks stay in step."""
    for which in BAD_INPUT:
        bad_input_on_one_rank_raises_on_all(platform, which)
    for which in DISAGREEMENTS:
        disagreement_on_experts_raises_on_all(platform, which)
    for which in NOT_COMBINED:
        combine_refuses(platform, which)
    combine_takes_what_it_is_told(platform)
    a_style_copies_once_for_any_number_of_experts(platform)
    if platform.world_size == 4:
        errors_name_world_ranks(platform)
