# SPDX-License-Identifier: Apache-2.0
"""How a process finds out which rank of what it is, and on which device."""

import os
import subprocess
import sys

import pytest
import torch
from hyperep_torch import device, world
from hyperep_torch.device import CPU, CUDA, DeviceKind, choose_kind
from hyperep_torch.world import join_world

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
import atexit, torch, torch.distributed as dist
atexit.register(lambda: print("left" if not dist.is_initialized() else "still there"))
from hyperep_torch.platform import join
platform = join(device="cpu", timeout=30)
print("rank", platform.rank, "sums", platform.all_reduce(torch.tensor([platform.rank + 1])).item())
"""


def _run(*commands):
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_environment())
        for command in commands
    ]
    try:
        return [process.communicate(timeout=90)[0] for process in processes], [p.returncode for p in processes]
    finally:
        for process in processes:
            process.kill()


def _environment():
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCH}
    return {**kept, "PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"}


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
