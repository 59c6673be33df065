# SPDX-License-Identifier: Apache-2.0
"""What the ranks of the tests run: `python raw_programs.py NAME` calls the function of that name."""

from __future__ import annotations

import os
import sys

import numpy as np
import torch
import torch.distributed as dist

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.int8)
MOVED = (*DTYPES, torch.uint8, torch.bool, torch.float64)  # types that need not be reduced


def start() -> None:
    """Join the process group of hccl."""
    torch.npu.set_device(RANK)
    dist.init_process_group("hccl")


def data(rank: int, shape: tuple[int, ...]) -> np.ndarray:
    """Rank *rank*'s numbers: small integers, different on each rank, that every type holds exactly."""
    return np.random.default_rng(1000 + rank).integers(0, 6, shape)


def on_npu(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The array on the device, as a type that NumPy may not have."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype).npu()


def check(found: torch.Tensor, expected: np.ndarray, what: str) -> None:
    """Equal values, exactly."""
    wanted = torch.from_numpy(np.ascontiguousarray(expected)).to(found.dtype)
    assert torch.equal(found.cpu(), wanted), f"rank {RANK}: {what} gave {found.cpu()}, expected {wanted}"


def collectives() -> None:
    """Every collective that the adapter uses, in every type, against NumPy."""
    start()
    shape = (3 * SIZE, 2)
    all_data = [data(rank, shape) for rank in range(SIZE)]
    mine = all_data[RANK]
    reductions = {dist.ReduceOp.SUM: np.sum, dist.ReduceOp.MAX: np.max, dist.ReduceOp.MIN: np.min}
    for dtype in DTYPES:
        for reduction, reduce in reductions.items():
            x = on_npu(mine, dtype)
            dist.all_reduce(x, reduction, async_op=True).wait()
            check(x, reduce(np.stack(all_data), axis=0), f"all_reduce {reduction} {dtype}")
        part = on_npu(np.zeros((3, 2)), dtype)
        dist.reduce_scatter_single(part, on_npu(mine, dtype), async_op=True).wait()
        check(part, np.sum(np.stack(all_data), axis=0)[3 * RANK : 3 * RANK + 3], f"reduce_scatter {dtype}")
    for dtype in MOVED:
        gathered = on_npu(np.zeros((SIZE * 3 * SIZE, 2)), dtype)
        dist.all_gather_single(gathered, on_npu(mine, dtype), async_op=True).wait()
        check(gathered, np.concatenate([torch.from_numpy(a).to(dtype).numpy() if dtype == torch.bool else a
                                        for a in all_data]), f"all_gather {dtype}")  # fmt: skip
        for source in (0, SIZE - 1):
            x = on_npu(mine, dtype)
            dist.broadcast(x, source, async_op=True).wait()
            check(x, all_data[source], f"broadcast from {source} {dtype}")
        exchanged = on_npu(np.zeros(shape), dtype)
        dist.all_to_all_single(exchanged, on_npu(mine, dtype), async_op=True).wait()
        check(exchanged, np.concatenate([a[3 * RANK : 3 * RANK + 3] for a in all_data]), f"even all_to_all {dtype}")
        uneven_all_to_all(dtype)
        lists(dtype)
    small = on_npu(np.array([RANK, 2]), torch.uint8)  # HCCL reduces no uint8 and no bool: torch_npu casts
    dist.all_reduce(small)
    check(small, np.array([SIZE * (SIZE - 1) // 2, 2 * SIZE]), "all_reduce of uint8")
    flags = on_npu(np.array([RANK == 1, False]), torch.bool)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    check(flags, np.array([True, False]), "all_reduce of bool")
    objects = [None] * SIZE
    dist.all_gather_object(objects, {"rank": RANK})
    assert objects == [{"rank": rank} for rank in range(SIZE)]
    dist.barrier()


def lists(dtype: torch.dtype) -> None:
    """Lists of tensors, which torch_npu pads to the alignment of HCCL."""
    for count in (1, 3, 16):
        gathered = [on_npu(np.zeros(count), dtype) for _ in range(SIZE)]
        dist.all_gather(gathered, on_npu(data(RANK, (count,)), dtype))
        for rank, found in enumerate(gathered):
            expected = torch.from_numpy(data(rank, (count,))).to(dtype)
            assert torch.equal(found.cpu(), expected), f"list of {dtype} from rank {rank}: {found.cpu()}, {expected}"


def uneven_all_to_all(dtype: torch.dtype) -> None:
    """Rank i sends (i + 2 j) % 4 rows to rank j: some of them none; the last rank sends nothing at all."""
    sends = np.array([[(i + 2 * j) % 4 if i < SIZE - 1 else 0 for j in range(SIZE)] for i in range(SIZE)])
    rows = [data(rank, (int(sends[rank].sum()), 5)) for rank in range(SIZE)]
    expected = []
    for i in range(SIZE):
        begin = int(sends[i, :RANK].sum())
        expected.append(rows[i][begin : begin + int(sends[i, RANK])])
    received = sends[:, RANK].tolist()
    output = on_npu(np.zeros((sum(received), 5)), dtype)
    dist.all_to_all_single(output, on_npu(rows[RANK], dtype), received, sends[RANK].tolist(), async_op=True).wait()
    check(output, np.concatenate(expected), f"uneven all_to_all {dtype}")


def large() -> None:
    """Messages that need many pieces, the last of them not full."""
    start()
    count = 1_000_003
    ramp = torch.arange(count, dtype=torch.float32)
    x = (ramp + RANK).npu()
    dist.all_reduce(x, async_op=True).wait()
    assert torch.equal(x.cpu(), ramp * SIZE + SIZE * (SIZE - 1) / 2)
    rows = [400_001 + 7 * rank for rank in range(SIZE)]  # rank r gets rows[r] from everyone
    sent = torch.cat([torch.arange(n, dtype=torch.float32) + 1000 * RANK + to for to, n in enumerate(rows)]).npu()
    got = torch.zeros(SIZE * rows[RANK]).npu()
    dist.all_to_all_single(got, sent, [rows[RANK]] * SIZE, rows, async_op=True).wait()
    wanted = [torch.arange(rows[RANK], dtype=torch.float32) + 1000 * source + RANK for source in range(SIZE)]
    assert torch.equal(got.cpu(), torch.cat(wanted))


def groups() -> None:
    """Sub-groups, by themselves and interleaved with the group of all."""
    start()
    halves = [dist.new_group(list(range(SIZE // 2))), dist.new_group(list(range(SIZE // 2, SIZE)))]
    own = halves[0] if RANK < SIZE // 2 else halves[1]
    for turn in range(5):
        world, half = torch.full((4,), float(RANK + turn)).npu(), torch.full((3,), float(RANK)).npu()
        works = [dist.all_reduce(world, async_op=True), dist.all_reduce(half, group=own, async_op=True)]
        for work in works:
            work.wait()
        members = range(SIZE // 2) if RANK < SIZE // 2 else range(SIZE // 2, SIZE)
        check(world, np.full(4, sum(r + turn for r in range(SIZE))), "world")
        check(half, np.full(3, sum(members)), "half")


def read_without_wait() -> None:
    """Read a collective's result once before and once after waiting: with delayed streams the first is garbage."""
    start()
    x = torch.full((4,), float(RANK + 1)).npu()
    dist.all_reduce(x.clone(), async_op=True).wait()  # connects
    torch.npu.synchronize()
    output = torch.zeros(4 * SIZE).npu()
    work = dist.all_gather_single(output, x, async_op=True)
    early = output.cpu().tolist()
    work.wait()
    late = output.cpu().tolist()
    assert late == [float(rank + 1) for rank in range(SIZE) for _ in range(4)], late
    print("EARLY", early == late)


def early_host_copy() -> None:
    """Read a non-blocking copy to the host once before and once after synchronising."""
    torch.npu.set_device(RANK)
    x = torch.arange(4.0).npu() + 1
    host = torch.zeros(4).pin_memory()
    host.copy_(x, non_blocking=True)
    early = host.tolist()
    torch.npu.current_stream().synchronize()
    assert host.tolist() == [1.0, 2.0, 3.0, 4.0]
    print("EARLY", early == host.tolist())


def split_mismatch() -> None:
    """Rank 0 sends two rows to rank 1, which expects three."""
    start()
    sends = [1, 2] if RANK == 0 else [1, 1]
    receives = [1, 1] if RANK == 0 else [3, 1]
    output = torch.zeros(sum(receives), 4).npu()
    dist.all_to_all_single(output, torch.ones(sum(sends), 4).npu(), receives, sends, async_op=True).wait()
    torch.npu.synchronize()


def operation_mismatch() -> None:
    """Rank 0 reduces where rank 1 broadcasts."""
    start()
    x = torch.ones(4).npu()
    work = dist.all_reduce(x, async_op=True) if RANK == 0 else dist.broadcast(x, 0, async_op=True)
    work.wait()
    torch.npu.synchronize()


def dead_rank() -> None:
    """The last rank dies between two collectives."""
    start()
    x = torch.ones(4).npu()
    dist.all_reduce(x, async_op=True).wait()
    torch.npu.synchronize()
    if RANK == SIZE - 1:
        os._exit(3)
    dist.all_reduce(x, async_op=True).wait()
    torch.npu.synchronize()


def late_rank() -> None:
    """The last rank lives, and does not come."""
    start()
    x = torch.ones(4).npu()
    dist.all_reduce(x, async_op=True).wait()
    torch.npu.synchronize()
    if RANK == SIZE - 1:
        import time

        time.sleep(12)
    dist.all_reduce(x, async_op=True).wait()
    torch.npu.synchronize()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    if dist.is_initialized():
        dist.destroy_process_group()
