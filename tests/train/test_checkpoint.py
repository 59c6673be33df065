# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole, at any number of ranks, never half written; and what is wrong with one is said."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from hyperep.loopback import LoopbackPlatform, run
from hyperep.train import checkpoint
from hyperep.train.loop import main
from hyperep.train.resume import settings_for
from hyperep.train.trainer import new_state

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, {}), (4, {})), ((4, {}), (1, {})), ((1, {}), (2, {})), ((4, {"style": "etp", "tp": 2}), (2, {}))],
)
def test_a_run_goes_on_at_another_number_of_ranks_as_if_nothing_had_been(train, small, before, after):
    _, expected = train(1, small(steps=4))
    first = small(steps=2, **before[1])
    train(before[0], first)
    resumed = settings_for({"steps": 4, "style": "ep", "tp": 1, "verify": True, **after[1]}, first.out)
    summary, found = train(after[0], resumed)
    assert [record["step"] for record in found] == [1, 2, 3, 4]
    np.testing.assert_allclose([r["loss"] for r in found], [r["loss"] for r in expected], rtol=1e-5)
    assert summary["verified"] is True


def test_files_hold_whole_parameters_under_their_paths(train, small):
    settings = small(steps=1)
    train(4, settings)
    manifest = checkpoint.read_manifest(settings.out)
    model = load_file(manifest.directory / manifest.model)
    platform = LoopbackPlatform()
    fresh = new_state(platform, settings, unsharded=True).parameters
    assert {name: array.shape for name, array in model.items()} == {n: p.shape for n, p in fresh.items()}
    w1 = model["layer0.moe.experts.w1"]
    # One step has moved the experts of every rank, by about the learning rate.
    moved = np.abs(w1 - platform.local(fresh["layer0.moe.experts.w1"])).max(axis=(1, 2))
    assert ((moved > 1e-3) & (moved < 3e-2)).all()
    optimizer = load_file(manifest.directory / manifest.optimizer)
    assert set(optimizer) == {f"{kind}.{name}" for kind in ("mean", "square") for name in model}


def test_a_run_goes_on_in_another_precision(train, small):
    _, expected = train(1, small(steps=4))
    first = small(steps=2, dtype="float32")
    train(1, first)
    _, found = train(2, settings_for({"steps": 4, "dtype": "float64"}, first.out))
    np.testing.assert_allclose([r["loss"] for r in found], [r["loss"] for r in expected], rtol=1e-5)


def test_a_checkpoint_is_written_every_so_many_steps_and_only_the_last_is_kept(train, small):
    settings = small(steps=3, save_every=2)
    with pytest.MonkeyPatch.context() as patch:
        saved = []
        original = checkpoint.save
        patch.setattr(checkpoint, "save", lambda d, p, state, s: saved.append(state.step) or original(d, p, state, s))
        train(1, settings)
    assert saved == [2, 3]
    assert sorted(os.listdir(Path(settings.out) / "checkpoint")) == [
        "model-3.safetensors",
        "optimizer-3.safetensors",
        "state.json",
    ]


@pytest.mark.parametrize("dies_at", ["model-2.safetensors", "optimizer-2.safetensors", "state.json"])
def test_dying_while_writing_leaves_the_checkpoint_before(train, small, monkeypatch, dies_at):
    settings = small(steps=1)
    train(1, settings)
    original = os.replace

    def replace_or_die(source, target):
        if Path(target).name == dies_at:
            raise KeyboardInterrupt
        original(source, target)

    monkeypatch.setattr(os, "replace", replace_or_die)
    platform = LoopbackPlatform()
    with pytest.raises(KeyboardInterrupt):
        main(platform, settings_for({"steps": 2}, settings.out).as_dict())
    manifest = checkpoint.read_manifest(settings.out)
    assert manifest.step == 1
    assert checkpoint.load(manifest, platform, new_state(platform, settings, unsharded=True), "float64").step == 1


def test_a_resumed_run_takes_over_settings_and_changes_what_it_may(train, small):
    settings = small(steps=1, seed=5)
    train(1, settings)
    resumed = settings_for({"steps": 3, "lr": 0.5}, settings.out)
    assert resumed == replace(settings, steps=3, lr=0.5, resume=settings.out)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 9, "dim": 32}, r"dim=32, but the checkpoint in .* was trained with 16; leave the option out"),
        ({"steps": 9, "experts": 8}, r"experts=8, but .* trained with 4"),
        ({}, r"steps=1, but the checkpoint in .* is at step 1 already; give --steps above 1"),
    ],
)
def test_a_resumed_run_must_fit(train, small, given, message):
    settings = small(steps=1)
    train(1, settings)
    with pytest.raises(ValueError, match=message):
        settings_for(given, settings.out)


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint: .*state.json.* name the --out directory"):
        settings_for({}, str(tmp_path))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda d: (d / "state.json").write_text("{"), ValueError, r"state.json cannot be read"),
        (
            lambda d: (d / "state.json").write_text('{"format": 99}'),
            ValueError,
            r"format 99, this version",
        ),
        (lambda d: (d / "model-1.safetensors").write_bytes(b"short"), ValueError, r"model-1.safetensors is damaged"),
        (lambda d: (d / "optimizer-1.safetensors").unlink(), FileNotFoundError, r"optimizer-1.safetensors is gone"),
    ],
)
def test_a_damaged_checkpoint_is_an_error_on_every_rank(train, small, damage, error, message):
    settings = small(steps=1)
    train(1, settings)
    damage(Path(settings.out) / "checkpoint")
    again = replace(settings, steps=2, resume=settings.out)

    def caught(platform):
        with pytest.raises(error, match=message):
            main(platform, again.as_dict())
        return True

    assert run(caught, 2) == [True, True]


def test_the_manifest_does_not_hold_what_belongs_to_one_machine(train, small):
    settings = small(steps=1)
    train(2, settings)
    content = json.loads((Path(settings.out) / "checkpoint" / "state.json").read_text())
    assert "ranks" not in content["settings"]
    assert "platform" not in content["settings"]
