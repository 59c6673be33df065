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
from hyperep.platform.errors import RankFailure
from hyperep.train import checkpoint, durable, whole_state
from hyperep.train.loop import main
from hyperep.train.resume import settings_for
from hyperep.train.tensor_file import digest
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
        patch.setattr(checkpoint, "save", lambda d, p, s, *a, **k: saved.append(s.step) or original(d, p, s, *a, **k))
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


@pytest.mark.parametrize("name", ["model-2.safetensors", "optimizer-2.safetensors", "state.json"])
def test_what_a_killed_save_has_left_is_swept(train, small, name):
    settings = small(steps=1)
    train(1, settings)
    directory = Path(settings.out) / "checkpoint"
    others = {"mine.safetensors", "notes.partial"}
    for left in (name, f"{name}.partial", *others) if name != "state.json" else (f"{name}.partial", *others):
        (directory / left).write_text("half")
    before = {"state.json", "model-1.safetensors", "optimizer-1.safetensors", *others}
    main(LoopbackPlatform(), settings_for({"steps": 2}, settings.out).as_dict())
    assert set(os.listdir(directory)) == {x.replace("-1", "-2") for x in before}
    (directory / "model-9.safetensors.partial").touch()  # and when a run begins, not only when one saves
    with pytest.raises(RankFailure, match="diverged"):
        train(1, settings_for({"steps": 4, "lr": 1e30}, settings.out))
    assert set(os.listdir(directory)) == {x.replace("-1", "-2") for x in before}


def test_the_disk_has_a_file_before_its_name_and_every_file_before_the_one_that_counts(train, small, monkeypatch):
    settings = small(steps=1)
    directory = Path(settings.out) / "checkpoint"
    events = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def replace_it(source, target):
        events.append(("name", str(target)))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace_it)
    train(1, settings)
    expected = [
        event
        for name in ("model-1.safetensors", "optimizer-1.safetensors", "state.json")
        for event in (
            ("sync", str(directory / f"{name}.partial")),
            ("name", str(directory / name)),
            ("sync", str(directory)),
        )
    ]
    assert events[-len(expected) :] == expected
    # The metrics up to that step, and the names of the directories, are there before.
    assert ("sync", str(directory.parent / "metrics.jsonl")) in events[: -len(expected)]
    assert ("sync", str(directory.parent)) in events[: -len(expected)]
    assert ("sync", str(directory.parent.parent)) in events[: -len(expected)]


def test_a_file_system_that_cannot_sync_directories_is_none_to_fail_on(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    durable.sync(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        durable.sync(tmp_path)


# ------------------------------------ never worse than the one before
def everything_in(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("steps", [2, 6])  # the step after which nothing would look at the weights again, and others
@pytest.mark.parametrize(
    ("lr", "dtype"), [(1e30, "float64"), (1e30, "float32"), (1e39, "float32"), (1e200, "float64"), (1e6, "float64")]
)
def test_weights_that_give_no_loss_do_not_replace_a_checkpoint(train, small, lr, dtype, steps):
    settings = small(steps=1)
    train(1, settings)
    directory = Path(settings.out) / "checkpoint"
    before = everything_in(directory)
    step = "after step 2, the last one" if steps == 2 else "at step 3"
    with pytest.raises(
        RankFailure, match=rf"(the loss|the norm of the gradient) is [\w.+-]+ {step}.*; try a lower --lr"
    ):
        train(2, settings_for({"steps": steps, "lr": lr, "save_every": 1, "dtype": dtype}, settings.out))
    assert everything_in(directory) == before
    _, records = train(1, settings_for({"steps": 2}, settings.out))  # and it can be used
    assert records[-1]["loss"] < 6


@pytest.mark.parametrize(("result", "what"), [("loss", "the loss"), ("gradient_norm", "the norm of the gradient")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_figures_that_are_not_finite_stop_a_run_before_the_update(train, small, monkeypatch, result, what, value):
    from hyperep.train import loop, trainer

    original, updates = loop.find_gradients, []

    def find_gradients(platform, settings, state, batch):
        found = original(platform, settings, state, batch)
        return replace(found, result=replace(found.result, **{result: value})) if state.step == 2 else found

    update = trainer.optimizer.update
    monkeypatch.setattr(loop, "find_gradients", find_gradients)
    monkeypatch.setattr(trainer.optimizer, "update", lambda *a, **k: updates.append(k["step"]) or update(*a, **k))
    settings = small(steps=4, save_every=1)
    with pytest.raises(RankFailure, match=rf"{what} is {value} at step 3; try a lower --lr than 0.01"):
        train(1, settings)
    assert updates == [1, 2]
    assert checkpoint.read_manifest(settings.out).step == 1
    lines = (Path(settings.out) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_tensor_that_is_not_finite_is_not_written(small, tmp_path):
    # Weights of an expert without tokens change no loss.
    platform, settings = LoopbackPlatform(), small()
    state = new_state(platform, settings, unsharded=True)
    how = {"run": "r", "text": "t"}
    checkpoint.save(tmp_path, platform, state, settings, **how)
    before = everything_in(tmp_path)
    state.moments.square["layer1.moe.experts.w2"][3, 0, 0] = np.inf
    with pytest.raises(ValueError, match=r"'square.layer1.moe.experts.w2' is no longer finite after step 0"):
        checkpoint.save(tmp_path, platform, replace(state, step=0), settings, **how)
    assert everything_in(tmp_path) == before


def test_a_disk_that_is_full_is_an_error_on_every_rank_and_leaves_the_checkpoint_before(train, small, monkeypatch):
    from hyperep.train import tensor_file

    settings = small(steps=1)
    train(1, settings)
    directory = Path(settings.out) / "checkpoint"
    before = everything_in(directory)

    def save_file(tensors, path, **others):
        Path(path).write_text("half")
        raise tensor_file.SafetensorError("No space left on device")

    monkeypatch.setattr(tensor_file, "save_file", save_file)

    def caught(platform):
        with pytest.raises((OSError, ValueError), match=r"model-2.safetensors cannot be written: No space left"):
            main(platform, settings_for({"steps": 2}, settings.out).as_dict())
        return True

    assert run(caught, 2) == [True, True]
    assert everything_in(directory) == before


# ------------------------------------ digests
def test_digests_tell_values_shapes_and_dtypes_apart():
    x = np.arange(6.0).reshape(2, 3)
    others = [x + 1, x.reshape(3, 2), x.astype(np.float32), np.ascontiguousarray(x[:, ::-1])]
    assert len({digest(y) for y in (x, *others)}) == 5
    assert digest(np.asfortranarray(x)) == digest(x)
    assert digest(np.zeros((0, 3))) != digest(np.zeros((3, 0)))


@pytest.mark.parametrize("kind", ["model", "optimizer"])
def test_one_bit_that_changed_is_found_by_every_rank(train, small, kind):
    settings = small(steps=1)
    train(1, settings)
    path = Path(settings.out) / "checkpoint" / f"{kind}-1.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # a value of the last tensor, which is still a number
    path.write_bytes(content)
    again = replace(settings, steps=2, resume=settings.out)

    def caught(platform):
        with pytest.raises(ValueError, match=rf"{kind}-1.safetensors is damaged: '.*' is not what was written"):
            main(platform, again.as_dict())
        return True

    assert run(caught, 2) == [True, True]


def test_files_of_two_checkpoints_are_no_checkpoint(train, small):
    first, second = small(steps=1), small(steps=2)
    train(1, first)
    train(1, second)
    directory = Path(first.out) / "checkpoint"
    os.replace(Path(second.out) / "checkpoint" / "model-2.safetensors", directory / "model-1.safetensors")
    with pytest.raises(ValueError, match=r"is of step 2 and holds .* they were not written together"):
        checkpoint.check(checkpoint.read_manifest(first.out))


def test_a_run_does_not_go_on_with_another_text(train, small, tmp_path):
    settings = small(steps=1)
    train(1, settings)
    moved = tmp_path / "moved.txt"
    moved.write_bytes(Path(settings.text).read_bytes())
    train(1, settings_for({"steps": 2, "text": str(moved)}, settings.out))
    with moved.open("r+b") as file:
        file.write(b"D")
    with pytest.raises(RankFailure, match=r"moved.txt' is not the one that the checkpoint in .* was trained on"):
        train(1, settings_for({"steps": 3, "text": str(moved)}, settings.out))
    train(1, settings_for({"steps": 3, "text": settings.text}, settings.out))


@pytest.mark.parametrize("written", ["float32", "float64"])
@pytest.mark.parametrize("wanted", ["float32", "float64"])
def test_everything_that_is_loaded_has_the_precision_of_the_run(train, small, written, wanted):
    settings = small(steps=1, dtype=written)
    train(1, settings)
    platform = LoopbackPlatform()
    manifest = checkpoint.read_manifest(settings.out)
    state = new_state(platform, replace(settings, dtype=wanted), unsharded=True)
    state = checkpoint.load(manifest, platform, state, wanted)
    whole = whole_state.gather(platform, state)
    assert {x.dtype for kind in whole.values() for x in kind.values()} == {np.dtype(wanted)}
    for moments in (state.moments.mean, state.moments.square):
        assert {x.dtype for x in moments.values()} == {np.dtype(wanted)}
        assert max(np.abs(x).max() for x in moments.values()) > 0


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


def edit(directory, **changes):
    path = directory / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda d: (d / "state.json").write_text("{"), ValueError, r"state.json cannot be read"),
        (
            lambda d: (d / "state.json").write_text('{"format": 99}'),
            ValueError,
            r"format 99, this version",
        ),
        (lambda d: (d / "state.json").write_text("[1]"), ValueError, r"state.json cannot be read: .*no object"),
        (lambda d: (d / "state.json").write_bytes(b"\xff"), ValueError, r"state.json cannot be read: Unicode"),
        (lambda d: edit(d, model=7), ValueError, r"cannot be read: .*model is 7, not of type str"),
        (lambda d: edit(d, model="../x"), ValueError, r"cannot be read: .*model is '../x', which is no name of a file"),
        (lambda d: edit(d, settings={"steps": "9"}), ValueError, r"cannot be read: .*steps='9' must be of type int"),
        (lambda d: edit(d, settings={"lr": True}), ValueError, r"cannot be read: .*lr=True must be of type float"),
        (lambda d: edit(d, step=2), ValueError, r"is of step 1 and holds .*they were not written together"),
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
