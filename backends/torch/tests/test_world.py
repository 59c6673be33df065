# SPDX-License-Identifier: Apache-2.0
"""How a process finds out which rank of what it is, and on which device."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hyperep_torch import device, world
from hyperep_torch.device import CPU, CUDA, DeviceKind, choose_kind
from hyperep_torch.launcher import launcher
from hyperep_torch.world import join_world

NEUTRAL = str(Path(__file__).parents[3] / "tests" / "neutral")

LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def _no_launch(monkeypatch):
    for name in (*LAUNCH, "HYPEREP_TORCH_DEVICE"):
        monkeypatch.delenv(name, raising=False)


class _Absent(DeviceKind):
    def is_available(self):
        return False


class _Present(DeviceKind):
    def is_available(self):
        return True


def test_the_first_available_kind_is_the_default():
    absent, present = _Absent(type="cuda", backend="nccl"), _Present(type="cuda", backend="nccl")
    assert choose_kind(None, (absent, CPU)) is CPU
    assert choose_kind(None, (present, CPU)) is present
    assert choose_kind("cpu", (present, CPU)) is CPU


def test_a_device_that_was_asked_for_is_never_replaced():
    with pytest.raises(ValueError, match="device='cuda' was asked for, but PyTorch sees no such device"):
        choose_kind("cuda", (_Absent(type="cuda", backend="nccl"), CPU))
    with pytest.raises(ValueError, match=r"device='tpu' is unknown here; choose one of \['cuda', 'cpu'\]"):
        choose_kind("tpu")


def test_the_environment_may_name_the_device(monkeypatch):
    monkeypatch.setenv("HYPEREP_TORCH_DEVICE", "tpu")
    with pytest.raises(ValueError, match="device='tpu' is unknown"):
        join_world()
    assert join_world(device="cpu").kind is CPU


def test_a_rank_has_a_device_of_its_own_or_an_error(monkeypatch):
    bound = []
    fake = type("fake", (), {"device_count": lambda: 2, "current_device": lambda: 1, "set_device": bound.append})
    monkeypatch.setattr(torch, "get_device_module", lambda kind: fake)
    assert CUDA.bind(0) == torch.device("cuda", 0)
    assert CUDA.bind(None) == torch.device("cuda", 1)
    assert bound == [0, 1]
    with pytest.raises(
        ValueError, match=r"local rank 2 has no cuda device of its own: this machine has 2; .*HYPEREP_TORCH_DEVICE=cpu"
    ):
        CUDA.bind(2)


def test_alone_without_a_launch():
    alone = join_world(device="cpu")
    assert (alone.rank, alone.size, str(alone.device)) == (0, 1, "cpu")


def test_half_a_launch_is_an_error_that_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(world.dist, "is_initialized", lambda: False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"RANK='1' but not MASTER_ADDR, MASTER_PORT; launch with torchrun"):
        join_world(device="cpu")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RANK": "2"}, "RANK=2 and WORLD_SIZE=2, but ranks go from 0 to 1"),
        ({"RANK": "first"}, "RANK='first', which is not a whole number"),
        ({"RANK": "-1"}, "RANK=-1, which must be at least 0"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two', which is not a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0, which must be at least 1"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http', which is not a whole number"),
        ({"LOCAL_RANK": "1.0"}, "LOCAL_RANK='1.0', which is not a whole number"),
    ],
)
def test_a_launch_with_numbers_that_cannot_be_names_the_variable(changed, message, monkeypatch):
    monkeypatch.setattr(world.dist, "is_initialized", lambda: False)
    right = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400", "LOCAL_RANK": "0"}
    for name, value in {**right, **changed}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="the environment has") as caught:
        join_world(device="cpu")
    assert message in str(caught.value)


SCHEDULERS = pytest.mark.parametrize(
    "told",
    [
        {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"},
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
        {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"},
    ],
    ids=["slurm", "open mpi", "pmi"],
)


@SCHEDULERS
def test_a_task_of_a_scheduler_is_never_silently_alone(told, monkeypatch):
    monkeypatch.setattr(world.dist, "is_initialized", lambda: False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert launcher.joined()
    with pytest.raises(ValueError, match=r"task 1 of 2 that .* MASTER_ADDR and MASTER_PORT do not say where") as caught:
        join_world(device="cpu")
    assert next(iter(told)) in str(caught.value)


@SCHEDULERS
def test_a_task_of_a_scheduler_joins_its_launch(told, tmp_path):
    rank, size, local = told
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = (
        "import torch\n"
        "from hyperep_torch.platform import join\n"
        "from hyperep_torch.meeting import local_rank\n"
        "import os, listening\n"
        "platform = join(device='cpu', timeout=200)\n"
        "total = platform.all_reduce(torch.tensor([platform.rank + 1])).item()\n"
        "told = os.path.exists('/proc/net/tcp')\n"
        "open_to = listening.beyond_loopback(listening.addresses([os.getpid()])) if told else []\n"
        "print(platform.rank, platform.world_size, local_rank(os.environ), total, open_to)\n"
    )
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environments = [{**meeting, rank: str(r), size: "2", local: str(r)} for r in range(2)]
    outputs, codes = _run(*[[sys.executable, "-c", program]] * 2, environments=environments)
    assert codes == [0, 0], outputs
    assert [output.splitlines()[-1] for output in outputs] == ["0 2 0 3 []", "1 2 1 3 []"]


def test_a_process_group_must_serve_the_device(monkeypatch):
    monkeypatch.setattr(world.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(world.dist, "get_backend_config", lambda: "cpu:gloo")
    kinds = (_Present(type="cuda", backend="nccl"), CPU)
    assert world._kind_of_default_group(None, kinds) is CPU
    with pytest.raises(
        ValueError, match="device='cuda' needs the backend 'nccl', but the process group has 'cpu:gloo'"
    ):
        world._kind_of_default_group("cuda", kinds)
    monkeypatch.setattr(world.dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    assert world._kind_of_default_group(None, kinds) is kinds[0]
    monkeypatch.setattr(world.dist, "get_backend_config", lambda: "cpu:mpi,cuda:mpi")
    with pytest.raises(ValueError, match=r"serves none of \['cuda:nccl', 'cpu:gloo'\]"):
        world._kind_of_default_group(None, kinds)


_USER_GROUP = """
import sys, torch, torch.distributed as dist
from hyperep_torch.platform import join
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
platform = join()
assert (platform.rank, platform.world_size, platform.device) == (rank, 2, "cpu"), platform
assert platform.all_reduce(torch.tensor([rank + 1])).item() == 3
assert join().group_size() == 2
dist.destroy_process_group()  # the program's own group, and its own end of it
"""

_TORCHRUN = """
import atexit, sys, torch, torch.distributed as dist
atexit.register(lambda: print("left" if not dist.is_initialized() else "still there"))
from hyperep_torch.platform import join
platform = join(device="cpu", timeout=200)
# One write, because both ranks have the same pipe.
sum = platform.all_reduce(torch.tensor([platform.rank + 1])).item()
sys.stdout.write(f"rank {platform.rank} sums {sum}\\n")
"""


def _run(*commands, environments=None):
    processes = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**_environment(), **extra}
        )
        for command, extra in zip(commands, environments or [{}] * len(commands), strict=True)
    ]
    try:
        return [process.communicate(timeout=250)[0] for process in processes], [p.returncode for p in processes]
    finally:
        for process in processes:
            process.kill()


def _environment():
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCH}
    return {**kept, "PYTHONPATH": os.pathsep.join([NEUTRAL, *sys.path]), "GLOO_SOCKET_IFNAME": "lo"}


def test_a_process_group_of_the_user_is_joined_and_left_alone(tmp_path):
    store = tmp_path / "store"
    outputs, codes = _run(*([sys.executable, "-c", _USER_GROUP, str(rank), str(store)] for rank in range(2)))
    assert codes == [0, 0], outputs


def test_torchrun_is_joined_and_left_at_exit(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(_TORCHRUN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    outputs, codes = _run([*torchrun, "--local-addr=127.0.0.1", "--nproc-per-node=2", str(script)])
    assert codes == [0], outputs
    assert "rank 0 sums 3" in outputs[0]
    assert "rank 1 sums 3" in outputs[0]
    # Handlers run in reverse order: the one above sees what the platform's own left behind.
    assert outputs[0].count("left") == 2, outputs


def test_importing_the_platform_starts_nothing(tmp_path):
    code = (
        "import sys, hyperep_torch, hyperep_torch.spec, hyperep_torch.probe\n"
        "assert 'torch' not in sys.modules\n"
        "import hyperep_torch.platform, torch.distributed as dist\n"
        "assert not dist.is_initialized()\n"
    )
    outputs, codes = _run([sys.executable, "-c", code])
    assert codes == [0], outputs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_rank_alone_on_cuda_does_everything_there():
    from hyperep_torch.platform import TorchPlatform

    platform = TorchPlatform(join_world(device="cuda"))
    x = torch.arange(6.0, device="cuda").reshape(3, 2)
    assert platform.device == f"cuda:{torch.cuda.current_device()}"
    assert torch.equal(platform.all_to_all_single(x), x)
    assert platform.to_host(platform.xp.zeros(2))[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", device.KINDS, ids=lambda kind: kind.type)
def test_every_kind_names_a_module_of_torch(kind):
    assert kind.module is getattr(torch, kind.type)
    assert kind.is_accelerator == (kind.type != "cpu")
