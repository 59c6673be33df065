# SPDX-License-Identifier: Apache-2.0
"""Collectives and their gradients between real gloo processes; every rank's data differs."""

import datetime
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "bool"]
# SPLITS[s][d] rows go from rank s to rank d; rank 1 of three sends nothing, and nothing goes to rank 0 of the last.
SPLITS = {
    "uneven": [[1, 3], [2, 0]],
    "silent rank": [[2, 2], [0, 0]],
    "deaf rank": [[0, 1], [0, 4]],
    "nothing": [[0, 0], [0, 0]],
}


def _rows(rank, rows, tail=(3,), dtype="float32"):
    """Values that name their rank and row, exact in every dtype."""
    values = rank * 32 + np.arange(rows).reshape(rows, *(1 for _ in tail)) + np.zeros((rows, *tail))
    tensor = torch.from_numpy(values)
    return tensor.to(getattr(torch, dtype)) if dtype != "bool" else tensor % 2 == 0


def _exchanged(splits, rank, tail=(3,), dtype="float32"):
    """What *rank* must receive."""
    parts = []
    for source, row in enumerate(splits):
        start = sum(row[:rank])
        parts.append(_rows(source, sum(row), tail, dtype)[start : start + row[rank]])
    return torch.cat(parts)


def _all_to_all(platform, splits, tail, dtype):
    sent, received = splits[platform.rank], [row[platform.rank] for row in splits]
    x = _rows(platform.rank, sum(sent), tail, dtype)
    expected = _exchanged(splits, platform.rank, tail, dtype)
    result = platform.all_to_all_single(x, received, sent)
    assert result.dtype == expected.dtype
    assert torch.equal(result, expected)
    work = platform.all_to_all_single(x, received, sent, async_op=True)
    first = work.wait()
    assert torch.equal(first, expected)
    assert work.wait() is first
    # Columns of a wider tensor are not contiguous.
    wide = torch.stack([x, x], dim=-1)[..., 0]
    assert torch.equal(platform.all_to_all_single(wide, received, sent), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_to_all_moves_the_rows_in_every_dtype(two, dtype):
    two.run(_all_to_all, SPLITS["uneven"], (3,), dtype)


@pytest.mark.parametrize("tail", [(), (2, 5)], ids=["1-D", "3-D"])
@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS)
def test_all_to_all_splits_count_rows(two, splits, tail):
    two.run(_all_to_all, splits, tail, "float32")


def _even_all_to_all(platform):
    counts = torch.arange(8, dtype=torch.int32) + 100 * platform.rank
    result = platform.all_to_all_single(counts)
    half = 4 * platform.rank
    assert result.tolist() == [*range(half, half + 4), *range(100 + half, 104 + half)]


def test_all_to_all_without_splits_is_even(two):
    two.run(_even_all_to_all)


def _gradient(platform, splits):
    sent, received = splits[platform.rank], [row[platform.rank] for row in splits]
    x = _rows(platform.rank, sum(sent)).requires_grad_()
    y = platform.differentiable_all_to_all_single(x, sent, received)
    assert y.requires_grad
    # The cotangent is expanded from one column: its stride is zero.
    column = torch.arange(1.0, y.shape[0] + 1)[:, None] + 10 * platform.rank
    y.backward(column.expand(-1, 3))
    expected = []
    for destination in range(platform.world_size):
        before = sum(row[destination] for row in splits[: platform.rank])
        expected += [before + i + 1.0 + 10 * destination for i in range(sent[destination])]
    assert torch.equal(x.grad, torch.tensor(expected)[:, None].expand(-1, 3))


@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS)
def test_gradient_of_all_to_all_goes_back_the_same_way(two, splits):
    two.run(_gradient, splits)


def _not_recorded(platform):
    x = torch.ones(4, 2, requires_grad=True)
    results = [
        platform.all_to_all_single(x),
        platform.all_gather(x),
        platform.all_reduce(x),
        platform.reduce_scatter(x),
        platform.broadcast(x),
    ]
    assert not any(r.requires_grad for r in results)
    assert all(r.data_ptr() != x.data_ptr() for r in results)
    assert torch.equal(x, torch.ones(4, 2))


def test_raw_collectives_are_not_recorded_and_leave_their_input(two):
    two.run(_not_recorded)


def _reductions(platform, dtype, rows):
    world = [_rows(rank, rows, dtype=dtype) for rank in range(platform.world_size)]
    x, stacked = world[platform.rank], torch.stack(world).double()
    for op, expected in (("sum", stacked.sum(0)), ("max", stacked.amax(0)), ("min", stacked.amin(0))):
        result = platform.all_reduce(x, op=op)
        assert result.dtype == x.dtype
        assert torch.equal(result.double(), expected)
    transposed = x.t().contiguous().t()  # the same values, not contiguous
    assert torch.equal(platform.all_gather(transposed), torch.cat(world))
    assert torch.equal(platform.all_reduce(transposed).double(), stacked.sum(0))
    part = rows // platform.world_size
    mine = slice(platform.rank * part, (platform.rank + 1) * part)
    assert torch.equal(platform.reduce_scatter(transposed).double(), stacked.sum(0)[mine])
    for source in range(platform.world_size):
        assert torch.equal(platform.broadcast(transposed, source), world[source])


@pytest.mark.parametrize("rows", [4, 0])
@pytest.mark.parametrize("dtype", DTYPES[:-1])
def test_gather_reduce_scatter_and_broadcast(two, dtype, rows):
    two.run(_reductions, dtype, rows)


def _tensor_parallel_pair(platform):
    weight = platform.rank + 2.0
    x = torch.full((3, 2), 0.5, requires_grad=True)
    y = platform.copy_to_group(x)
    assert torch.equal(y, x)
    y.backward(torch.full((3, 2), weight))
    assert torch.equal(x.grad, torch.full((3, 2), 5.0))  # (0 + 2) + (1 + 2)
    x = torch.full((3, 2), weight, requires_grad=True)
    y = platform.reduce_from_group(x)
    assert torch.equal(y, torch.full((3, 2), 5.0))
    y.backward(torch.full((3, 2), weight))
    assert torch.equal(x.grad, torch.full((3, 2), weight))


def test_copy_to_group_and_reduce_from_group_are_each_others_transpose(two):
    two.run(_tensor_parallel_pair)


def _sub_groups(platform):
    pairs = [platform.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    mine, other = pairs[platform.rank % 2], pairs[1 - platform.rank % 2]
    assert platform.group_size(mine) == 2
    total = platform.all_reduce(torch.tensor([10.0**platform.rank]), mine)
    assert total.item() == (101.0 if platform.rank % 2 == 0 else 1010.0)
    assert platform.broadcast(torch.tensor([platform.rank]), 1, mine).item() == 2 + platform.rank % 2
    with pytest.raises(ValueError, match="not a member"):
        platform.all_reduce(total, other)
    platform.barrier(mine)
    platform.barrier()


def test_sub_groups_number_their_own_ranks(four):
    four.run(_sub_groups)


def _threads(platform):
    import threading

    lines = [platform.new_group(ranks) for ranks in ([0, 1], [2, 3], [0, 2], [1, 3])]
    row, column = lines[platform.rank // 2], lines[2 + platform.rank % 2]
    totals = {}

    def reduce(name, group):
        for _ in range(20):
            totals[name] = platform.all_reduce(torch.tensor([10.0**platform.rank]), group).item()

    # Half of the ranks start with the other group first.
    names = [("row", row), ("column", column)][:: 1 if platform.rank % 2 else -1]
    threads = [threading.Thread(target=reduce, args=pair) for pair in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert totals == {
        "row": 11.0 if platform.rank < 2 else 1100.0,
        "column": 101.0 if platform.rank % 2 == 0 else 1010.0,
    }


def test_groups_may_be_used_from_threads(four):
    four.run(_threads)


def _left_alone(platform, stays_away):
    """What the error of a collective says on each rank but one, which does not come to it."""
    group = dist.new_group(range(4), timeout=datetime.timedelta(seconds=2))
    if stays_away == platform.rank:
        time.sleep(6)
        return None
    time.sleep(0.2 * platform.rank)
    with pytest.raises(RuntimeError) as raised:
        platform.all_to_all_single(torch.ones(8, 2), group=group)
    return "".join(getattr(raised.value, "__notes__", []))


@pytest.mark.parametrize("stays_away", [0, 2])
def test_who_does_not_come_is_named(four, stays_away):
    notes = [note for note in four.run(_left_alone, stays_away) if note]
    assert notes
    for note in notes:
        assert f"of the group of ranks [0, 1, 2, 3] timed out, and rank {stays_away} did not wait in it" in note


def _bad_input(platform):
    x = torch.ones(3, 2)
    for arguments, message in (
        (([1, 2], [1, 1]), r"input_splits=\[1, 1\] sum to 2, but there are 3 rows"),
        (([1, 2], [3]), r"input_splits=\[3\] must hold one non-negative"),
        (([-1, 4], [1, 2]), r"output_splits=\[-1, 4\] must hold one non-negative"),
        ((), "3 rows do not divide evenly among 2 ranks"),
    ):
        with pytest.raises(ValueError, match=message):
            platform.all_to_all_single(x, *arguments)
    with pytest.raises(ValueError, match="3 rows do not divide"):
        platform.reduce_scatter(x)
    with pytest.raises(ValueError, match="op='product'"):
        platform.all_reduce(x, op="product")
    with pytest.raises(ValueError, match="source=2"):
        platform.broadcast(x, 2)
    with pytest.raises(ValueError, match=r"new_group\(\[1, 0\]\)"):
        platform.new_group([1, 0])
    platform.barrier()


def test_bad_input_is_refused_before_anything_is_sent(two):
    two.run(_bad_input)
