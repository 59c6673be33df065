# SPDX-License-Identifier: Apache-2.0
"""The training program on MindSpore: its losses are the reference platform's, and so are its checkpoints."""

from pathlib import Path

import numpy as np
import pytest
import rank_cases
from safetensors.numpy import load_file

from hyperep.loopback import run
from hyperep.train import checkpoint, loop
from hyperep.train.metrics import read_metrics
from hyperep.train.settings import Settings

DEADLINE = 240.0


@pytest.fixture
def small(tmp_path):
    """Settings of a small run into the directory *name*, on a text that is read at once."""
    words = np.random.default_rng(0).choice(["def ", "return ", "x", "y", " + ", "\n", "(", ")"], size=2000)
    text = tmp_path / "text.txt"
    text.write_text("".join(words))
    sizes = {"layers": 1, "dim": 16, "experts": 4, "heads": 2, "seq_len": 16, "batch_tokens": 64, "lr": 1e-2}

    def settings(name, **changes):
        given = {"warmup_steps": 1, "text": str(text), "out": str(tmp_path / name), **sizes, **changes}
        return Settings(**given).as_dict()

    return settings


def _losses(settings):
    return [record["loss"] for record in read_metrics(Path(settings["out"]), last_step=settings["steps"])]


def _checkpoint(path):
    manifest = checkpoint.read_manifest(str(path))
    return {n: a for name in (manifest.model, manifest.optimizer) for n, a in load_file(Path(path) / name).items()}


def _bit_equal(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype, name
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def _on_loopback(ranks, function, *arguments):
    return run(lambda platform: function(platform, *arguments), ranks)


def test_losses_are_those_of_the_reference_platform(ranks, small, monkeypatch):
    monkeypatch.setattr(loop, "write_outputs", lambda *arguments, **keywords: None)
    reference = small("loopback", steps=3)
    _on_loopback(1, loop.main, reference)
    ours = small("mindspore", steps=3, verify=True)
    summary = ranks.run("hyperep.train.loop:main", {"settings": ours}, deadline=DEADLINE)[0]
    assert summary["verified"] is True
    np.testing.assert_allclose(_losses(ours), _losses(reference), rtol=1e-4)


@pytest.mark.parametrize("changes", [{"balance_experts": 2}, {"chunks": 2}])
def test_hot_experts_and_chunks_change_no_loss(two, small, monkeypatch, changes):
    monkeypatch.setattr(loop, "write_outputs", lambda *arguments, **keywords: None)
    reference = small("loopback", steps=2)
    _on_loopback(1, loop.main, reference)
    ours = small("mindspore", steps=2, verify=True, **changes)
    summary = two.run("hyperep.train.loop:main", {"settings": ours}, deadline=DEADLINE)[0]
    assert summary["verified"] is True
    np.testing.assert_allclose(_losses(ours), _losses(reference), rtol=1e-4)


def test_a_checkpoint_goes_through_every_platform_and_degree_bit_for_bit(platform, two, small, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "write_outputs", lambda *arguments, **keywords: None)
    settings = small("begin", steps=2)
    _on_loopback(4, loop.main, settings)
    paths = [tmp_path / "begin" / checkpoint.DIRECTORY, *(tmp_path / name for name in ("two", "one", "end"))]
    places = [str(path) for path in paths]
    arguments = {"settings": settings, "source": places[0], "target": places[1]}
    two.run("rank_cases:rewrite_checkpoint", arguments, deadline=DEADLINE)  # sharded over two ranks of MindSpore
    rank_cases.rewrite_checkpoint(platform, settings, places[1], places[2])  # whole on one
    _on_loopback(2, rank_cases.rewrite_checkpoint, settings, places[2], places[3])
    begin = _checkpoint(paths[0])
    assert begin["layer0.moe.experts.w1"].shape[0] == 4
    assert np.abs(begin["mean.layer0.moe.experts.w1"]).max() > 0
    for path in paths[1:]:
        _bit_equal(begin, _checkpoint(path))
