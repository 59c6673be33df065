# SPDX-License-Identifier: Apache-2.0
"""Programs that leave the process group to the end of the process end as they should."""

import os
import subprocess
import sys

import pytest

LATE = """
import mmap, os, sys, time
import torch, torch.distributed as dist
from hyperep_torch.platform import join

if sys.argv[2] == "the user's":
    store = "file://" + os.path.join(os.environ["HYPEREP_MEETING"], "store")
    dist.init_process_group("gloo", init_method=store, rank=int(os.environ["RANK"]), world_size=2)
platform = join(device="cpu", timeout=200)
seen = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 1)
if platform.rank:
    time.sleep(1)
    dist.all_reduce(torch.ones(4))
    seen[0] = 1
else:
    # Of all that may be slow here, only what matters is: gloo's thread has the last reference to the tensor when the
    # collective is done, and gets no chance to let go of it before the interpreter ends, as on a busy machine.
    sys.setswitchinterval(1000)
    dist.all_reduce(torch.ones(4), async_op=True)
    while not seen[0]:
        pass
    end = time.monotonic() + 1
    while time.monotonic() < end:
        pass
"""

SHORT = """
import torch, hyperep
from hyperep_torch.platform import join

platform = join(device="cpu", timeout=200)
mesh = hyperep.init_device_mesh(platform, (2,), ("ep",))
for size in range(1, 4):
    x = torch.ones(2 * size, 3, requires_grad=True)
    platform.differentiable_all_to_all_single(x, [size] * 2, [size] * 2, mesh.get_group()).sum().backward()
assert x.grad.sum() == 18
platform.all_reduce(torch.ones(4))
"""


def _codes(code, folder, *arguments):
    """Exit statuses of two ranks, and what they wrote."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                **{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "HYPEREP_MEETING": str(folder)},
                **{"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            },
        )
        for rank in range(2)
    ]
    try:
        told = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], told


@pytest.mark.skipif(sys.platform != "linux", reason="the interface lo")
@pytest.mark.parametrize("group", ["ours", "the user's"])
def test_threads_that_still_hold_a_tensor_do_not_abort_the_process(tmp_path, group):
    seen = tmp_path / "seen"
    seen.write_bytes(b"\0")
    assert _codes(LATE, tmp_path, str(seen), group) == ([0, 0], ["", ""])


@pytest.mark.skipif(sys.platform != "linux", reason="the interface lo")
def test_short_programs_end_with_status_0_time_after_time(tmp_path):
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert _codes(SHORT, folder) == ([0, 0], ["", ""])
