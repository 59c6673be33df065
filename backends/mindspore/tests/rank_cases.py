# SPDX-License-Identifier: Apache-2.0
"""What every rank runs in the tests of collectives; each rank's data differ, and NumPy knows the answers."""

import os
import resource
import signal
import time
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from measure import fill_weights, rows
from mindspore import mint, ops

from hyperep.moe import MoE
from hyperep.train import checkpoint
from hyperep.train.precision import choose_dtype
from hyperep.train.settings import Settings
from hyperep.train.trainer import new_state

DTYPES = ("float64", "float32", "float16", "int64", "int32", "bool")


def rows_of(rank, rows, tail=(3,), dtype="float32"):
    """Values that name their rank and row, exact in every dtype."""
    values = rank * 32 + np.arange(rows).reshape(rows, *(1 for _ in tail)) + np.zeros((rows, *tail))
    return values % 2 == 0 if dtype == "bool" else values.astype(dtype)


def splits_of(kind, ranks):
    """``[R, R]``: how many rows go from each rank to each."""
    splits = np.random.default_rng(5).integers(0, 4, (ranks, ranks))
    if kind == "nothing":
        splits[:] = 0
    if kind == "silent rank":
        splits[-1] = 0
    if kind == "deaf rank":
        splits[:, 0] = 0
    if kind == "to the next":
        splits[:] = 3 * np.roll(np.eye(ranks, dtype=np.int64), 1, axis=1)
    return splits


def exchanged(splits, rank, make):
    """What *rank* receives where each rank ``r`` sends ``make(r, rows)``."""
    parts = []
    for source, row in enumerate(splits):
        start = int(row[:rank].sum())
        parts.append(make(source, int(row.sum()))[start : start + row[rank]])
    return np.concatenate(parts)


def all_to_all(platform, kind, tail, dtypes):
    splits = splits_of(kind, platform.world_size)
    sent, received = splits[platform.rank].tolist(), splits[:, platform.rank].tolist()
    for dtype in dtypes:
        x = platform.from_host(rows_of(platform.rank, sum(sent), tail, dtype))
        expected = exchanged(splits, platform.rank, lambda r, n, d=dtype: rows_of(r, n, tail, d))
        result = platform.all_to_all_single(x, received, sent)
        _equal(platform, result, expected)
        work = platform.all_to_all_single(x, received, sent, async_op=True)
        first = work.wait()
        _equal(platform, first, expected)
        assert work.wait() is first
        # Columns of a wider tensor are not contiguous.
        wide = platform.xp.stack([x, x], axis=1)[:, 0]
        _equal(platform, platform.all_to_all_single(wide, received, sent), expected)


def even_all_to_all(platform):
    x = rows_of(platform.rank, 2 * platform.world_size)
    result = platform.all_to_all_single(platform.from_host(x))
    even = np.full((platform.world_size,) * 2, 2)
    _equal(platform, result, exchanged(even, platform.rank, rows_of))


def all_to_all_gradient(platform, kind):
    """The cotangent goes back where the row came from, also through a rank that gets nothing."""
    splits = splits_of(kind, platform.world_size)
    sent, received = splits[platform.rank].tolist(), splits[:, platform.rank].tolist()
    x = platform.from_host(rows_of(platform.rank, sum(sent)))
    _result, pullback = platform.vjp(lambda x: platform.differentiable_all_to_all_single(x, sent, received), x)
    cotangents = [rows_of(100 + r, int(splits[:, r].sum())) for r in range(platform.world_size)]
    (gradient,) = pullback(platform.from_host(cotangents[platform.rank]))
    _equal(platform, gradient, exchanged(splits.T, platform.rank, lambda r, n: cotangents[r]))


def reductions(platform):
    ranks, me = platform.world_size, platform.rank
    for dtype in DTYPES:
        mine = [rows_of(r, 2 * ranks, dtype=dtype) - (0 if dtype == "bool" else 40) * (r % 2) for r in range(ranks)]
        mine = [m.astype(dtype) for m in mine]
        x = platform.from_host(mine[me])
        every = np.stack(mine)
        _equal(platform, platform.all_gather(x), np.concatenate(mine))
        _equal(platform, platform.all_reduce(x, op="max"), every.max(0))
        _equal(platform, platform.all_reduce(x, op="min"), every.min(0))
        _equal(platform, platform.broadcast(x, ranks - 1), mine[-1])
        if dtype != "bool":
            _equal(platform, platform.all_reduce(x), every.sum(0, dtype=dtype))
            _equal(platform, platform.reduce_scatter(x), every.sum(0, dtype=dtype)[2 * me : 2 * me + 2])
        _equal(platform, x, mine[me])  # not changed in place
        strided = platform.xp.permute_dims(x, (1, 0))
        _equal(platform, platform.all_gather(strided), np.concatenate([m.T for m in mine]))


def empty_collectives(platform):
    xp, ranks = platform.xp, platform.world_size
    for _ in range(2):
        x = xp.zeros((0, 3))
        assert tuple(platform.all_gather(x).shape) == (0, 3)
        assert tuple(platform.all_reduce(x).shape) == (0, 3)
        assert tuple(platform.broadcast(x).shape) == (0, 3)
        assert tuple(platform.reduce_scatter(x).shape) == (0, 3)
        assert tuple(platform.reduce_scatter(xp.zeros((ranks, 0))).shape) == (1, 0)
        assert tuple(platform.all_gather(xp.zeros((1, 0))).shape) == (ranks, 0)
        assert tuple(platform.all_to_all_single(xp.zeros((ranks, 0))).shape) == (ranks, 0)
        # The ranks are still in step.
        _equal(platform, platform.all_reduce(xp.ones((2,))), np.full(2, ranks, np.float32))


def nothing_is_recorded(platform):
    """Plain collectives in a differentiated function cause no collective in backward, and no gradient."""
    xp, ranks = platform.xp, platform.world_size

    def function(x):
        gathered = platform.all_gather(x)[:ranks] + platform.reduce_scatter(xp.concat([x] * ranks))
        return platform.all_reduce(x) + platform.all_to_all_single(x) + platform.broadcast(x) + gathered + 3.0 * x

    _, pullback = platform.vjp(function, xp.ones((ranks,)))
    if platform.rank == 0:
        # Alone: a collective in here would hang.
        (gradient,) = pullback(xp.ones((ranks,)))
        assert set(gradient.asnumpy().tolist()) == {3.0}
    platform.barrier()


def tensor_parallel_pair(platform):
    ranks, me = platform.world_size, platform.rank
    x = platform.from_host(rows_of(me, 2))
    total = np.sum([rows_of(r, 2) for r in range(ranks)], axis=0)
    copied, pullback = platform.vjp(platform.copy_to_group, x)
    _equal(platform, copied, rows_of(me, 2))
    _equal(platform, pullback(x)[0], total)
    reduced, pullback = platform.vjp(platform.reduce_from_group, x)
    _equal(platform, reduced, total)
    _equal(platform, pullback(x)[0], rows_of(me, 2))


def groups(platform):
    """Rows and columns of a grid, and single ranks; the same ranks twice; collectives of several groups in turn."""
    me, ranks = platform.rank, platform.world_size
    wide = max(1, ranks // 2)
    lines = [list(range(start, start + wide)) for start in range(0, ranks, wide)]
    lines += [list(range(start, ranks, wide)) for start in range(wide)]
    lines += [[r] for r in range(ranks)] + [list(range(ranks)), lines[0]]
    made = [(line, platform.new_group(line)) for line in lines]
    for _ in range(2):
        for line, group in made:
            if me in line:
                x = platform.from_host(rows_of(me, len(line)))
                _equal(platform, platform.all_gather(x, group), np.concatenate([rows_of(r, len(line)) for r in line]))
                _equal(platform, platform.all_reduce(x, group), np.sum([rows_of(r, len(line)) for r in line], axis=0))
                _equal(platform, platform.broadcast(x, len(line) - 1, group), rows_of(line[-1], len(line)))
                even, here = np.ones((len(line),) * 2, np.int64), line.index(me)
                expected = exchanged(even, here, lambda r, n, line=line: rows_of(line[r], n))
                _equal(platform, platform.all_to_all_single(x, group=group), expected)
                platform.barrier(group)
    outside = next((group for line, group in made if me not in line), None)
    if outside is not None:
        with pytest.raises(ValueError, match="not a member"):
            platform.all_reduce(platform.xp.ones((1,)), outside)


def plain_reduction_of_gradients(platform):
    """MindSpore's own in-place all-reduce of what ``ms.value_and_grad`` gives is right, as people write it."""
    layer = MoE(platform, dim=6, hidden_dim=5, num_experts=4, top_k=2)
    fill_weights(platform, layer)
    x = platform.from_host(rows(platform.rank, 7, 6))
    parameters = layer.trainable_params()
    _, gradients = ms.value_and_grad(lambda x: ops.sum(layer(x) ** 2), None, parameters)(x)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        own = gradient.asnumpy().copy()
        (every,) = platform.to_host(platform.all_gather(platform.from_host(own[None])))
        mint.distributed.all_reduce(gradient)
        np.testing.assert_allclose(gradient.asnumpy(), every.sum(0), rtol=1e-4, atol=1e-4, err_msg=parameter.name)


def several_under_way(platform):
    """Works waited for in another order than they were issued."""
    kinds = ["uneven", "to the next", "silent rank"]
    works = []
    for i, kind in enumerate(kinds):
        splits = splits_of(kind, platform.world_size)
        sent, received = splits[platform.rank].tolist(), splits[:, platform.rank].tolist()
        x = platform.from_host(rows_of(platform.rank, sum(sent)) + 1000 * i)
        works.append((i, splits, platform.all_to_all_single(x, received, sent, async_op=True)))
    for i, splits, work in reversed(works):
        _equal(platform, work.wait(), exchanged(splits, platform.rank, lambda r, n, i=i: rows_of(r, n) + 1000 * i))


def bad_splits(platform):
    x = platform.xp.zeros((4, 2))
    ranks = platform.world_size
    for arguments, message in [
        (([4] + [0] * (ranks - 1), [5] + [0] * (ranks - 1)), "sum to 5, but there are 4 rows"),
        (([4], [4]), "one non-negative number of rows for each of"),
        (([4, -1] + [0] * (ranks - 2), [4] + [0] * (ranks - 1)), "one non-negative number"),
    ]:
        with pytest.raises(ValueError, match=message):
            platform.all_to_all_single(x, *arguments)
    platform.barrier()


def world(platform):
    platform.barrier()
    return platform.rank, platform.world_size


def process_id(platform):
    return os.getpid()


def die(platform, rank):
    platform.barrier()
    if platform.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    platform.barrier()


def fail(platform, rank):
    if platform.rank == rank:
        raise ZeroDivisionError("division of an expert by zero")
    platform.barrier()


def _equal(platform, result, expected):
    (found,) = platform.to_host(result)
    assert found.dtype == expected.dtype, (found.dtype, expected.dtype)
    np.testing.assert_array_equal(found, expected)


def rewrite_checkpoint(platform, settings, source, target):
    """Load a checkpoint into this platform's model, sharded as its ranks are, and write it again."""
    chosen = Settings.from_dict(settings)
    state = new_state(platform, chosen)
    dtype = choose_dtype(platform, chosen.dtype)
    manifest = checkpoint.read_manifest(source)
    state = checkpoint.load(manifest, platform, state, dtype)
    checkpoint.save(Path(target), platform, state, chosen, run=manifest.run, text=manifest.text)
    platform.barrier()


def sleep(platform, seconds):
    time.sleep(seconds)


def faults_of_the_next_array(platform):
    """Page faults of an array of 400 MB, when one of that size was there before; the least of several tries."""

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones((100, 1_000_000), dtype=np.float32)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    return min(faults() for _ in range(5))
