# SPDX-License-Identifier: Apache-2.0
"""The example program, as a user starts it: at two ranks it is the program on one."""

import pathlib
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "huggingface.py"


def _train(directory, launcher):
    command = [sys.executable, *launcher, EXAMPLE, "--steps", "8", "--save", directory]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    lines = done.stdout.splitlines()
    losses = [float(line.split()[3]) for line in lines if line.startswith("step ")]
    told = [line for line in lines if line.startswith("model.layers.")]
    return losses, told, AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def test_two_ranks_are_one(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    (losses, told, model), (wanted, _, reference) = (
        _train(tmp_path / name, launcher) for name, launcher in (("two", torchrun), ("one", ()))
    )
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert losses[-1] < losses[0] - 1
    assert len(told) == 2
    assert "times the mean" in told[0]
    for (name, found), right in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (found - right).abs().max() < 1e-3 * right.abs().max(), name
