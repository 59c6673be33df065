# SPDX-License-Identifier: Apache-2.0
"""An output directory belongs to one run, at one time to one process, and nothing of it is lost to a kill."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hyperep.loopback import LoopbackPlatform, run
from hyperep.platform.errors import RankFailure
from hyperep.train import checkpoint, claim
from hyperep.train.loop import main
from hyperep.train.metrics import MetricsWriter, read_metrics
from hyperep.train.resume import settings_for
from hyperep.train.settings import Settings

pytestmark = pytest.mark.usefixtures("no_pictures")


def ids(out):
    """The id in every line of the metrics, and that of the checkpoint."""
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return {json.loads(line)["run"] for line in lines} | {checkpoint.read_manifest(out).run}


def steps(out):
    return [record["step"] for record in read_metrics(Path(out), last_step=99)]


def again(settings, **changes):
    return Settings(**{**settings.as_dict(), **changes})


# ------------------------------------ one run
def test_a_run_has_one_id_in_metrics_and_state_also_when_it_goes_on(train, small):
    first, second = small(steps=1), small(steps=1)
    train(2, first)
    train(1, second)
    (id,) = ids(first.out)
    assert ids(second.out).isdisjoint({id})
    train(1, settings_for({"steps": 3}, first.out))
    assert ids(first.out) == {id}
    assert steps(first.out) == [1, 2, 3]


def test_a_run_that_was_moved_is_the_same_run(train, small, tmp_path):
    settings = small(steps=1)
    train(1, settings)
    (id,) = ids(settings.out)
    shutil.move(settings.out, tmp_path / "moved")
    train(1, settings_for({"steps": 2}, str(tmp_path / "moved")))
    assert ids(tmp_path / "moved") == {id}


def test_a_run_that_goes_on_elsewhere_is_another_one_with_the_steps_before(train, small, tmp_path):
    settings = small(steps=2)
    train(1, settings)
    (id,) = ids(settings.out)
    branch = settings_for({"steps": 3, "out": str(tmp_path / "branch")}, settings.out)
    train(1, branch)
    (other,) = ids(branch.out)
    assert other != id
    assert steps(branch.out) == [1, 2, 3]
    assert steps(settings.out) == [1, 2]


def test_a_new_run_does_not_touch_the_directory_of_another(train, small):
    settings = small(steps=2)
    train(1, settings)
    before = {path: path.read_bytes() for path in Path(settings.out).rglob("*") if path.is_file()}
    (id,) = ids(settings.out)
    expected = rf"out='{settings.out}' holds another run \({id}\); choose another --out, .* --resume, .* --overwrite"

    def caught(platform):
        with pytest.raises(ValueError, match=expected):
            main(platform, again(settings, steps=1).as_dict())
        return True

    assert run(caught, 2) == [True, True]  # on every rank
    assert {path: path.read_bytes() for path in Path(settings.out).rglob("*") if path.is_file()} == before


def test_overwriting_leaves_nothing_of_the_other_run_and_all_that_is_not_of_a_run(train, small):
    settings = small(steps=2)
    train(1, settings)
    (id,) = ids(settings.out)
    out = Path(settings.out)
    for name in ("loss.png", "report.html", "notes.txt", "checkpoint/mine.safetensors"):
        (out / name).write_text("mine")
    with pytest.MonkeyPatch.context() as patch:  # the new one gets no further than its beginning
        patch.setattr("hyperep.train.loop.find_gradients", lambda *arguments: os.stat("/no/such/file"))
        with pytest.raises(RankFailure, match="no/such/file"):
            train(1, again(settings, overwrite=True))
    left = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert left == ["checkpoint/mine.safetensors", "metrics.jsonl", "notes.txt"]
    assert (out / "metrics.jsonl").read_text() == ""
    train(1, settings)  # a run that took no step owns nothing
    assert id not in ids(out)
    assert steps(out) == [1, 2]


def test_a_run_that_goes_on_overwrites_nothing_of_its_own(train, small):
    settings = small(steps=2)
    train(1, settings)
    (id,) = ids(settings.out)
    train(1, settings_for({"steps": 3, "overwrite": True}, settings.out))
    assert (ids(settings.out), steps(settings.out)) == ({id}, [1, 2, 3])
    # Whether to overwrite is asked anew each time.
    assert not settings_for({"steps": 4}, settings.out).overwrite


def test_a_run_does_not_go_on_into_the_directory_of_another(train, small):
    one, other = small(steps=1), small(steps=1)
    train(1, one)
    train(1, other)
    there = settings_for({"steps": 2, "out": other.out}, one.out)
    with pytest.raises(RankFailure, match="holds another run"):
        train(1, there)
    assert ids(other.out).isdisjoint(ids(one.out))
    train(1, again(there, overwrite=True))
    assert steps(other.out) == [1, 2]
    assert len(ids(other.out)) == 1


def test_two_runs_are_not_mixed_where_somebody_put_files_together(train, small):
    one, other = small(steps=2), small(steps=1)
    train(1, one)
    train(1, other)
    shutil.copy(Path(one.out) / "metrics.jsonl", other.out)
    with pytest.raises(
        RankFailure, match=r"metrics.jsonl holds lines of run '\w+', but the checkpoint is of run '\w+'"
    ):
        train(1, settings_for({"steps": 3}, other.out))
    with pytest.raises(RankFailure, match="holds another run"):
        train(1, other)


@pytest.mark.parametrize("what", ["metrics.jsonl", "checkpoint/state.json"])
@pytest.mark.parametrize("content", ["nonsense\n", '{"step": 1}\n'])
def test_what_cannot_be_read_may_be_a_run(train, small, what, content):
    settings = small(steps=1)
    path = Path(settings.out) / what
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(RankFailure, match=r"holds another run \(unknown\)"):
        train(1, settings)
    assert path.read_text() == content
    train(1, again(settings, overwrite=True))
    assert len(ids(settings.out)) == 1


# ------------------------------------ one process
def test_the_second_of_two_at_once_is_refused(train, small):
    settings = small(steps=2, out=small().out)
    with claim.claimed(Path(settings.out), "mine", overwrite=False):
        for what in (settings, again(settings, overwrite=True)):
            with pytest.raises(RankFailure, match=rf"out='{settings.out}' is in use: another run is writing there"):
                train(1, what)
        with pytest.raises(ValueError, match="is in use"):
            claim.check_claim(Path(settings.out), "mine", overwrite=False)
    train(1, settings)


def test_of_several_that_begin_together_one_runs(small):
    settings, ends = small(steps=2), []

    def begin():
        try:
            main(LoopbackPlatform(), settings.as_dict())
            ends.append("done")
        except ValueError as error:
            ends.append("in use" if "is in use" in str(error) else "holds" if "holds another" in str(error) else error)

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert ends.count("done") == 1
    assert set(ends) <= {"done", "in use", "holds"}
    assert steps(settings.out) == [1, 2]
    assert len(ids(settings.out)) == 1


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path):
    code = (
        "import signal, sys; from pathlib import Path; from hyperep.train.claim import claimed\n"
        "with claimed(Path(sys.argv[1]), 'x', overwrite=False): print('held', flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="is in use"):
            claim.check_claim(tmp_path, "y", overwrite=False)
        holder.send_signal(signal.SIGKILL)
        holder.wait(30)
    claim.check_claim(tmp_path, "y", overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_where_directories_cannot_be_locked_a_file_is(tmp_path, monkeypatch):
    real = fcntl.flock

    def flock(descriptor, how):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with claim.claimed(tmp_path, "x", overwrite=False), pytest.raises(ValueError, match="is in use"):
        claim.check_claim(tmp_path, "x", overwrite=False)
    claim.check_claim(tmp_path, "x", overwrite=False)


# ------------------------------------ killed at any moment
def test_a_run_that_is_killed_at_any_moment_goes_on_and_no_line_is_lost_or_there_twice(small, monkeypatch):
    """Each child dies a moment later than the one before, until one gets to its end."""
    settings = small(steps=2, save_every=1)
    main(LoopbackPlatform(), settings.as_dict())
    (id,) = ids(settings.out)
    loss = [record["loss"] for record in read_metrics(Path(settings.out), last_step=9)]
    kills = 0
    while True:
        child = os.fork()
        if child == 0:
            _die_after(kills, monkeypatch)
            main(LoopbackPlatform(), settings_for({"steps": 4}, settings.out).as_dict())
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        records = read_metrics(Path(settings.out), last_step=9)
        assert [r["loss"] for r in records][:2] == loss
        assert [r["step"] for r in records] == list(range(1, len(records) + 1))
        manifest = checkpoint.read_manifest(settings.out)
        checkpoint.check(manifest)
        assert manifest.step <= len(records)
        assert ids(settings.out) == {id}
        if status == 0 or manifest.step == 4:
            break
        assert status == 9
        kills += 1
    assert kills >= 14
    assert steps(settings.out) == [1, 2, 3, 4]


def _die_after(calls, patch):
    """End this process at the call number *calls* of those that change what is on the disk."""
    count = 0

    def fatal(real):
        def call(*arguments, **keywords):
            nonlocal count
            if count == calls:
                os._exit(9)
            count += 1
            return real(*arguments, **keywords)

        return call

    for where, name in (
        (os, "replace"),
        (os, "fsync"),
        (os, "unlink"),
        (Path, "write_bytes"),
        (Path, "write_text"),
        (Path, "unlink"),
        (MetricsWriter, "write"),
    ):
        patch.setattr(where, name, fatal(getattr(where, name)))
