# SPDX-License-Identifier: Apache-2.0
"""``hyperep train`` on PyTorch: the losses of the reference platform, at any number of real ranks."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from hyperep.loopback import run
from hyperep.train.batches import global_batch
from hyperep.train.loop import main
from hyperep.train.metrics import read_metrics
from hyperep.train.optimizer import EPSILON
from hyperep.train.resume import settings_for
from hyperep.train.settings import Settings
from hyperep.train.text import load_text
from hyperep.train.trainer import new_state

SMALL = {"steps": 4, "dim": 16, "experts": 4, "heads": 2, "seq_len": 16, "batch_tokens": 128, "warmup_steps": 1}
COMMAND = ["train", "--dim", "16", "--heads", "2", "--experts", "4", "--seq-len", "16", "--batch-tokens", "128"]
COMMAND += ["--steps", "2", "--verify"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    words = np.random.default_rng(0).choice(["def ", "return ", "x", "y", " + ", "\n", "(", ")"], size=4000)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(words))
    return str(path)


@pytest.fixture(scope="module")
def reference(text, tmp_path_factory):
    """Losses on the loopback platform, one rank."""
    out = tmp_path_factory.mktemp("reference")
    settings = Settings(**SMALL, lr=1e-2, text=text, out=str(out))
    run(lambda platform: main(platform, settings.as_dict()), 1)
    return [record["loss"] for record in read_metrics(out, last_step=4)]


@pytest.mark.parametrize(
    ("world", "changes", "rtol"),
    [
        ("platform", {}, 1e-9),
        ("two", {}, 1e-9),
        ("four", {}, 1e-9),
        ("four", {"style": "etp", "tp": 2}, 1e-9),
        ("two", {"style": "tp", "tp": 2}, 1e-9),
        ("four", {"balance_experts": 2}, 1e-9),
        ("four", {"style": "etp", "tp": 2, "balance_experts": 1}, 1e-9),
        ("two", {"chunks": 3}, 1e-9),
        ("two", {"dtype": "float32"}, 1e-5),
    ],
)
def test_losses_are_those_of_the_reference_platform(request, text, reference, tmp_path, world, changes, rtol):
    ranks = request.getfixturevalue(world)
    settings = Settings(**SMALL, lr=1e-2, text=text, out=str(tmp_path), verify=True, **changes).as_dict()
    summaries = [main(ranks, settings)] if world == "platform" else ranks.run(main, settings, deadline=250)
    assert reference[-1] < reference[0] - 0.3
    found = [record["loss"] for record in read_metrics(tmp_path, last_step=4)]
    np.testing.assert_allclose(found, reference, rtol=rtol)
    assert all(summary["verified"] for summary in summaries)  # every rank knows


def test_a_checkpoint_of_the_reference_platform_goes_on_here(two, text, reference, tmp_path):
    settings = Settings(**{**SMALL, "steps": 2}, lr=1e-2, text=text, out=str(tmp_path))
    run(lambda platform: main(platform, settings.as_dict()), 4)
    two.run(main, settings_for({"steps": 4}, str(tmp_path)).as_dict(), deadline=250)
    found = [record["loss"] for record in read_metrics(tmp_path, last_step=4)]
    np.testing.assert_allclose(found, reference, rtol=1e-9)


def hyperep(*launcher, arguments, folder, **environment):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.setdefault(name, "")
    given = {name: value for name, value in {**os.environ, **environment}.items() if value}
    return subprocess.run(
        [sys.executable, *launcher, "-m", "hyperep", *arguments],
        cwd=folder,
        env=given,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_command_starts_its_ranks(text, tmp_path):
    end = hyperep(arguments=[*COMMAND, "--platform", "torch", "--ranks", "2", "--text", text], folder=tmp_path)
    assert end.returncode == 0, end.stderr
    assert "every step agrees with that of the unsharded model" in end.stdout
    assert end.stdout.count("report: run/report.html") == 1
    assert torch.__version__ in (tmp_path / "run" / "report.html").read_text()


def test_the_command_joins_a_launch(text, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    end = hyperep(*launcher, arguments=[*COMMAND, "--platform", "torch", "--text", text], folder=tmp_path)
    assert end.returncode == 0, end.stderr
    assert end.stdout.count("every step agrees") == 1  # said by rank 0 alone
    assert len(read_metrics(tmp_path / "run", last_step=9)) == 2


def test_a_failing_rank_shows_its_error(text, tmp_path):
    arguments = [*COMMAND, "--platform", "torch", "--ranks", "2", "--text", text, "--lr", "1e300", "--steps", "9"]
    end = hyperep(arguments=arguments, folder=tmp_path)
    assert end.returncode == 2
    assert re.search(r"ValueError: (the loss|the norm of the gradient) is nan at step 2; try a lower --lr", end.stderr)


def test_the_steps_are_those_of_a_plain_training_loop_of_pytorch(platform, text, tmp_path):
    settings = Settings(**SMALL, lr=1e-2, balance=0.0, clip_norm=0.5, text=text, out=str(tmp_path), dtype="float64")
    main(platform, settings.as_dict())
    found = [record["loss"] for record in read_metrics(tmp_path, last_step=4)]

    model = new_state(platform, settings, unsharded=True).model
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), eps=EPSILON)
    tokens, expected = load_text(text).tokens, []
    for step in range(settings.steps):
        batch = global_batch(tokens, seed=0, step=step, sequences=settings.sequences, seq_len=settings.seq_len)
        logits, _ = model(torch.from_numpy(batch[:, :-1]))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch[:, 1:].reshape(-1)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    np.testing.assert_allclose(found, expected, rtol=1e-6)
