# SPDX-License-Identifier: Apache-2.0
"""The README's PyTorch program, run as written, under torchrun."""

import pathlib
import re
import subprocess
import sys

import pytest
import torch

from hyperep.moe import MoE

sys.path.insert(0, str(pathlib.Path(__file__).parents[3] / "tests" / "neutral"))
import documented

README = pathlib.Path(__file__).parents[3] / "README.md"
RANKS, STEPS = 2, 20


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What the program printed, and the directory where each of its ranks has left its parameters."""
    folder = tmp_path_factory.mktemp("readme")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (program,) = [block for block in blocks if block.startswith("# train_moe.py")]
    script = folder / "train_moe.py"
    script.write_text(program, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command = [*torchrun, documented.__file__, script, "layer", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def test_program_under_torchrun(trained):
    steps = [line.split() for line in trained[0].splitlines() if "(4, 128, 64)" in line]
    losses = [float(words[-1]) for words in steps]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] / 2


def test_its_replicas_are_equal_and_those_of_the_unsharded_run(platform, trained):
    """The same training on one rank, with the tokens of all of them."""
    layer = MoE(platform, dim=64, hidden_dim=128, num_experts=8, top_k=2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    torch.manual_seed(0)
    target = torch.nn.Linear(64, 64)
    generators = [torch.Generator().manual_seed(1 + rank) for rank in range(RANKS)]
    for _ in range(STEPS):
        tokens = torch.cat([torch.randn(256, 64, generator=generator) for generator in generators])
        (layer(tokens) - target(tokens).detach()).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = {name: parameter.detach().numpy() for name, parameter in layer.named_parameters()}
    documented.check(trained[1], RANKS, whole, tolerance=1e-4)
