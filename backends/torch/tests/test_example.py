# SPDX-License-Identifier: Apache-2.0
"""The example program as a user starts it: sharded over four ranks in each arrangement, it is the program on one."""

import pathlib
import subprocess
import sys

import pytest
import torch

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
STEPS = 5


def _train(folder, launcher, *arguments):
    """Losses and norms of each step, and the whole weights in the end."""
    weights = folder / "weights.pt"
    fixed = ("--steps", STEPS, "--dtype", "float64", "--device", "cpu", "--save", weights)
    command = [sys.executable, *launcher, EXAMPLES / "train.py", *fixed, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("step ")]
    figures = torch.tensor([[float(line[3]), float(line[5])] for line in lines], dtype=torch.float64)
    assert figures.shape == (STEPS, 2)
    return figures, torch.load(weights)


@pytest.fixture(scope="module")
def unsharded(tmp_path_factory):
    return _train(tmp_path_factory.mktemp("unsharded"), ())


@pytest.mark.parametrize("ep", [4, 2, 1])
def test_sharded_training_is_unsharded_training(tmp_path, unsharded, ep):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 4)
    figures, weights = _train(tmp_path, torchrun, "--ep", ep)
    wanted_figures, wanted = unsharded
    torch.testing.assert_close(figures, wanted_figures, rtol=1e-5, atol=0)
    assert figures[-1, 0] < figures[0, 0] - 0.3
    assert weights.keys() == wanted.keys()
    for name, weight in weights.items():
        assert (weight - wanted[name]).abs().max() < 1e-5 * wanted[name].abs().max(), name
