# SPDX-License-Identifier: Apache-2.0
"""The README's PyTorch program, run as written, under torchrun."""

import pathlib
import re
import subprocess
import sys

import hyperep_torch as hep
import numpy as np
import pytest
import torch
import torch.nn.functional as F

README = pathlib.Path(__file__).parents[3] / "README.md"
RANKS, STEPS = 2, 20

SAVE = """
import os
import sys

import numpy

parts = {name: p.detach().to_local().cpu().numpy() for name, p in model.named_parameters()}
numpy.savez(f"{sys.argv[1]}/rank{os.environ['RANK']}.npz", **parts)
"""
"""What is added to the program: every rank leaves its part of each parameter."""


def _program():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (program,) = [block for block in blocks if block.startswith("# train_moe.py")]
    return program


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What the program printed, and what each of its ranks has left."""
    folder = tmp_path_factory.mktemp("readme")
    script = folder / "train_moe.py"
    script.write_text(_program() + SAVE, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    done = subprocess.run([*torchrun, script, folder], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, [dict(np.load(folder / f"rank{rank}.npz")) for rank in range(RANKS)]


def test_program_under_torchrun(trained):
    steps = [line.split() for line in trained[0].splitlines() if "(4, 128, 64)" in line]
    losses = [float(words[-1]) for words in steps]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] / 2


def test_its_weights_are_those_of_the_unsharded_run(trained):
    """The same training on one rank, with the tokens of all of them."""
    model = _model()
    hep.init_weights(model, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    generators = [torch.Generator().manual_seed(rank) for rank in range(RANKS)]
    for _ in range(STEPS):
        x = torch.cat([torch.randint(256, (512,), generator=generator) for generator in generators])
        F.cross_entropy(model(x), (3 * x + 1) % 256).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        found = np.concatenate([parts[name] for parts in trained[1]])
        deviation = np.abs(found - parameter.detach().numpy()).max() / parameter.abs().max().item()
        assert deviation < 1e-3, f"{name} is {deviation:.1e} from the unsharded run's"


def _model():
    """The README's model, made of its own lines."""
    names = {}
    program = _program()
    exec(program[: program.index("device =")], names)
    line = next(line for line in program.splitlines() if line.strip().startswith("model = "))
    exec(line.strip(), names)
    return names["model"]


LEARNING_RATE = float(re.search(r"AdamW\(model.parameters\(\), lr=([^,]+),", _program())[1])
