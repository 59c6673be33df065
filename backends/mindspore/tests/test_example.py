# SPDX-License-Identifier: Apache-2.0
"""The native example, run as written under msrun: it trains, and its ranks stay what one rank would be."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import documented
import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_moe.py"
RANKS, STEPS = 2, 20


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What the workers have printed, and the directory where each of them has left its parameters."""
    folder = tmp_path_factory.mktemp("example")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "mindspore.parallel.cluster.run"),
        *(f"--worker_num={RANKS}", f"--local_worker_num={RANKS}", f"--master_port={port}", "--join=True"),
        *(f"--log_dir={folder / 'logs'}", documented.__file__, str(EXAMPLE), "model", str(folder)),
    ]
    # msrun starts its workers with the python that is first in PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    msrun = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env=environment
    )
    try:
        printed, _ = msrun.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        msrun.send_signal(signal.SIGINT)  # ends its workers, which have process groups of their own
        msrun.wait(20)
        raise
    logs = "\n".join(log.read_text(errors="replace") for log in sorted((folder / "logs").glob("worker_*.log")))
    assert msrun.returncode == 0, printed[-2000:] + logs[-4000:]
    return logs, folder


def test_it_trains_under_msrun(trained):
    losses = [float(value) for value in re.findall(r"^\d+ \(4, 128, 64\) (\S+)$", trained[0], flags=re.M)]
    assert len(losses) == STEPS
    assert losses[-1] < 0.7 * losses[0]


def test_its_replicas_are_equal_and_those_of_the_unsharded_run(trained):
    """The same model on one rank, with the tokens of all of them."""
    source = EXAMPLE.read_text(encoding="utf-8")
    example = {}
    exec(compile(source[: source.index("hyperep.ExpertParallel()")], str(EXAMPLE), "exec"), example)
    model = example["model"]
    optimizer = nn.AdamWeightDecay(model.trainable_params(), learning_rate=3e-3)
    target = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32) / 6
    data = [np.random.default_rng(1 + rank) for rank in range(RANKS)]
    step = ms.value_and_grad(lambda tokens, wanted: ops.mean((model(tokens) - wanted) ** 2), None, optimizer.parameters)
    for _ in range(STEPS):
        tokens = np.concatenate([rng.normal(size=(128, 32)).astype(np.float32) for rng in data])
        _, gradients = step(ms.Tensor(tokens), ms.Tensor(np.tanh(tokens @ target)))
        optimizer(gradients)
    whole = {name: parameter.asnumpy() for name, parameter in example["platform"].parameters(model).items()}
    documented.check(trained[1], RANKS, whole, tolerance=1e-4)
