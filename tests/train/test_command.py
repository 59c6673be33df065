# SPDX-License-Identifier: Apache-2.0
"""``hyperep train``: its options, and every error that it must put in one clear message."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hyperep.cli import main as hyperep
from hyperep.loopback import run
from hyperep.platform.errors import UnsupportedCapability
from hyperep.platform.spec import PlatformSpec
from hyperep.train import launch, trainer
from hyperep.train.loop import main
from hyperep.train.metrics import read_metrics
from hyperep.train.preflight import preflight

OPTIONS = ["--dim", "16", "--heads", "2", "--experts", "4", "--seq-len", "16", "--batch-tokens", "128", "--steps", "2"]


@pytest.fixture
def command(text, tmp_path, capfd):
    """Run the command in this process, on loopback unless said otherwise; return exit status, output and errors."""

    def run_it(*arguments):
        given = ["train", *OPTIONS, "--platform", "loopback", "--text", text, "--out", str(tmp_path / "out")]
        capfd.readouterr()
        status = 0
        try:
            hyperep([*given, *arguments])
        except SystemExit as end:
            status = end.code or 0
        return status, *capfd.readouterr()

    return run_it


def test_a_run_says_how_it_went(command, tmp_path):
    status, output, errors = command("--ranks", "2", "--verify", "--top-k", "1", "--layers", "1")
    assert status == 0, errors
    assert "loss 5." in output
    assert (
        "every step agrees with that of the unsharded model from the same weights. Largest relative deviations"
        in output
    )
    assert f"report: {tmp_path / 'out'}/report.html" in output.replace("\n", "")
    assert "load max/mean" in errors
    (settings,) = (json.loads(f.read_text())["settings"] for f in tmp_path.rglob("state.json"))
    assert (settings["top_k"], settings["layers"], settings["steps"]) == (1, 1, 2)
    assert len(read_metrics(tmp_path / "out", last_step=9)) == 2


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_is_not_verified_fails(command, monkeypatch):
    monkeypatch.setattr(trainer, "sum_gradients", lambda p, parameters, own, parallel, others=(): (own, list(others)))
    status, output, _ = command("--ranks", "2", "--verify")
    assert status == 1
    assert "steps DIFFER from those of the unsharded model" in output


@pytest.mark.usefixtures("no_pictures")
def test_a_run_is_resumed_with_the_settings_that_it_had(command, tmp_path):
    assert command("--ranks", "2", "--lr", "0.02")[0] == 0
    status, output, errors = command("--resume", str(tmp_path / "out"), "--steps", "3")
    assert status == 0, errors
    assert "in 3 steps" in output
    (settings,) = (json.loads(f.read_text())["settings"] for f in tmp_path.rglob("state.json"))
    assert settings["lr"] == 0.02


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--text", "no-such-text"], ["'no-such-text' does not exist", "--text takes a file or a directory"]),
        (["--text", os.devnull], [f"{os.devnull!r} is empty", "--text"]),
        (["--seq-len", "100000", "--batch-tokens", "100000"], ["need 100001", "--seq-len"]),
        (["--experts", "4", "--ranks", "3"], ["experts=4 is not divisible by the 3 ranks", "multiple of 3"]),
        (["--batch-tokens", "100"], ["batch_tokens=100 is not divisible by seq_len=16", "for example 96"]),
        (["--batch-tokens", "48", "--ranks", "2"], ["batch_tokens=48 is not divisible by 2 ranks", "multiple of 32"]),
        (["--top-k", "5"], ["top_k=5 must not be above experts=4"]),
        (["--dim", "18"], ["dim=18 is not divisible", "multiple of 4"]),
        (["--steps", "0"], ["steps=0 must be at least 1"]),
        (["--ranks", "0"], ["ranks=0", "at least one"]),
        (["--dtype", "bfloat16"], ["dtype='bfloat16' is none of auto, float32, float64"]),
        (["--style", "dp"], ["style='dp' is none of ep, tp, etp"]),
        (["--tp", "2", "--ranks", "2"], ["tp=2 with style 'ep'", "choose etp or tp"]),
        (["--style", "tp", "--tp", "3", "--ranks", "4"], ["tp=3 does not divide the 4 ranks"]),
        (["--platform", "torhc"], ["unknown platform 'torhc'", "installed:", "loopback"]),
        (["--resume", "no-such-run"], ["'no-such-run' holds no checkpoint", "--out"]),
        (["--lr", "inf"], ["lr=inf must be a finite number"]),
        (["--lr", "nan"], ["lr=nan must be a finite number"]),
        (["--balance", "inf"], ["balance=inf must be a finite number"]),
    ],
)
def test_bad_input_is_one_message(command, no_ranks, arguments, messages):
    status, output, errors = command(*arguments)
    assert status == 2
    assert errors.startswith("hyperep: error: ")
    assert "Traceback" not in errors
    for message in messages:
        assert message in errors
    assert not output


def file_as_out(folder):
    (folder / "out").write_text("mine")
    return [], ["/out is a file", "give --out a directory"]


def file_above_out(folder):
    (folder / "file").write_text("mine")
    return ["--out", str(folder / "file" / "deeper" / "out")], ["/file is a file", "give --out a directory"]


def link_to_nowhere_as_out(folder):
    (folder / "out").symlink_to(folder / "nowhere")
    return [], ["/out is no directory", "give --out a directory"]


def out_that_cannot_be_written(folder):
    return ["--out", "/proc/self/out"], ["out='/proc/self/out': /proc/self cannot be written", "another --out"]


def metrics_that_are_a_directory(folder):
    (folder / "out" / "metrics.jsonl").mkdir(parents=True)
    return [], ["metrics.jsonl is a directory", "another --out"]


def checkpoint_that_is_a_file(folder):
    (folder / "out").mkdir()
    (folder / "out" / "checkpoint").touch()
    return [], ["checkpoint cannot be written (Not a directory)", "another --out"]


def another_run_in_out(folder):
    (folder / "out").mkdir()
    (folder / "out" / "metrics.jsonl").write_text('{"run": "abc", "step": 1}\n')
    return [], ["holds another run (abc)", "another --out", "--resume", "--overwrite"]


def fifo_as_text(folder):
    os.mkfifo(folder / "pipe")
    return ["--text", str(folder / "pipe")], ["pipe is no regular file", "--text"]


def fifo_in_the_text(folder):
    (folder / "texts").mkdir()
    os.mkfifo(folder / "texts" / "pipe")
    return ["--text", str(folder / "texts")], ["pipe is no regular file", "--text"]


def link_to_nowhere_in_the_text(folder):
    (folder / "texts").mkdir()
    (folder / "texts" / "link").symlink_to(folder / "nowhere")
    return ["--text", str(folder / "texts")], ["link cannot be read (No such file or directory)", "--text"]


MISTAKES = [
    file_as_out,
    file_above_out,
    link_to_nowhere_as_out,
    out_that_cannot_be_written,
    metrics_that_are_a_directory,
    checkpoint_that_is_a_file,
    another_run_in_out,
    fifo_as_text,
    fifo_in_the_text,
    link_to_nowhere_in_the_text,
]


@pytest.fixture
def no_ranks(monkeypatch):
    """Have the start of ranks fail the test."""
    monkeypatch.setattr(launch, "run_on_ranks", lambda *arguments, **keywords: pytest.fail("ranks were started"))


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_with_files_is_one_line_before_any_rank_starts(command, no_ranks, tmp_path, mistake):
    arguments, messages = mistake(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, output, errors = command(*arguments)
    assert status == 2
    assert errors.startswith("hyperep: error: ")
    assert errors.count("\n") == 1
    for message in messages:
        assert message in errors
    assert not output
    assert sorted(tmp_path.rglob("*")) == before


def cut_off(directory):
    path = directory / "model-2.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return "model-2.safetensors is damaged"


def one_bit(directory):
    path = directory / "optimizer-2.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return "optimizer-2.safetensors is damaged"


def no_file(directory):
    (directory / "model-2.safetensors").unlink()
    return "model-2.safetensors is gone"


def foreign(directory):
    (directory / "state.json").write_text('{"epoch": 3, "best_model_checkpoint": null}')
    return "state.json cannot be read: KeyError: 'format'"


def foreign_metrics(directory):
    (directory.parent / "metrics.jsonl").write_text("step,loss\n1,5.5\n")
    return "metrics.jsonl, line 1, is no record of a step"


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("damage", [cut_off, one_bit, no_file, foreign, foreign_metrics])
def test_a_damaged_checkpoint_is_one_line_before_any_rank_starts(command, request, tmp_path, damage):
    assert command()[0] == 0
    message = damage(tmp_path / "out" / "checkpoint")
    request.getfixturevalue("no_ranks")
    status, output, errors = command("--resume", str(tmp_path / "out"), "--steps", "3")
    assert (status, errors.count("\n"), output) == (2, 1, "")
    assert errors.startswith("hyperep: error: ")
    assert message in errors


@pytest.mark.usefixtures("no_pictures")
def test_another_text_than_before_is_one_line_before_any_rank_starts(command, request, tmp_path, text):
    assert command()[0] == 0
    Path(text).write_text(Path(text).read_text().replace("return", "RETURN", 1))
    request.getfixturevalue("no_ranks")
    status, _, errors = command("--resume", str(tmp_path / "out"), "--steps", "3")
    assert (status, errors.count("\n")) == (2, 1)
    assert f"text {text!r} is not the one that the checkpoint" in errors


@pytest.mark.usefixtures("no_pictures")
def test_a_directory_is_used_again_for_another_run_if_one_says_so(command, tmp_path):
    assert command()[0] == 0
    first = (tmp_path / "out" / "metrics.jsonl").read_text()
    assert command()[0] == 2
    status, _, errors = command("--overwrite", "--seed", "1")
    assert status == 0, errors
    assert (tmp_path / "out" / "metrics.jsonl").read_text() != first


def test_double_precision_of_a_platform_that_never_has_it_is_told_before_any_rank_starts(small):
    spec = PlatformSpec(name="x", api=(2, 2), factory="x:y", probe="x:y")
    with pytest.raises(UnsupportedCapability, match="'x' does not support float64: train with --dtype float32"):
        preflight(small(dtype="float64"), spec, 1)
    preflight(small(), spec, 1)


def test_a_rank_that_fails_shows_its_error(command, monkeypatch):
    original = trainer.cross_entropy

    def fail_on_rank_1(platform, *arguments):
        if platform.rank == 1:
            raise ZeroDivisionError("expert 3 by zero")
        return original(platform, *arguments)

    monkeypatch.setattr(trainer, "cross_entropy", fail_on_rank_1)
    status, _, errors = command("--ranks", "2")
    assert status == 2
    assert "rank 1 of 2 raised: ZeroDivisionError: expert 3 by zero" in errors
    assert "fail_on_rank_1" in errors  # its traceback


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_gradient_that_is_no_number_ends_the_run(command):
    status, _, errors = command("--ranks", "2", "--lr", "1e300", "--steps", "9")
    assert status == 2
    assert re.search(r"the norm of the gradient is nan at step 2; try a lower --lr than 1e\+300", errors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": 5}, "experts=5 is not divisible"),
        ({"batch_tokens": 48}, "batch_tokens=48 is not divisible"),
        ({"text": os.devnull}, "is empty"),
    ],
)
def test_bad_input_is_an_error_on_every_rank_of_a_launch(small, changes, message):
    settings = small(**changes)

    def caught(platform):
        with pytest.raises(ValueError, match=message):
            main(platform, settings.as_dict())
        return True

    assert run(caught, 2) == [True, True]


def test_ranks_with_different_texts_are_an_error_on_every_rank(small, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("y" * 500)

    def caught(platform):
        settings = small(**({"text": str(other)} if platform.rank == 1 else {}))
        with pytest.raises(ValueError, match=r"ranks have read different texts, of \[\d+, 500\] bytes; .*--text"):
            main(platform, settings.as_dict())
        return True

    assert run(caught, 2) == [True, True]


LAME = """
    import os
    from hyperep.launch import Launcher, LaunchPlan, RankProcess
    from hyperep.platform.hookspecs import hookimpl
    from hyperep.platform.spec import PlatformSpec, Viability

    class LameLauncher(Launcher):
        def joined(self):
            return False
        def plan(self, ranks):
            return LaunchPlan(processes=tuple(
                RankProcess(ranks=(r,), environment={"LAME_RANK": str(r)}) for r in range(ranks)))

    launcher = LameLauncher()

    def make():
        raise OSError("device " + os.environ["LAME_RANK"] + " is on fire")

    @hookimpl
    def hyperep_platform_spec():
        probe = "lame:Viability.yes"
        return PlatformSpec(name="lame", api=(2, 2), factory="lame:make", probe=probe, LAUNCHER)
"""


@pytest.mark.parametrize(
    ("launcher", "messages"),
    [
        ('launcher="lame:launcher"', ["of 2 raised: OSError: device ", " is on fire"]),
        ("", ["ranks=2, but platform 'lame' names no launcher and is always one rank"]),
    ],
)
def test_ranks_that_do_not_start(text, tmp_path, launcher, messages):
    site = tmp_path / "site"
    (site / "lame-1.0.dist-info").mkdir(parents=True)
    (site / "lame-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: lame\nVersion: 1.0\n")
    (site / "lame-1.0.dist-info" / "entry_points.txt").write_text("[hyperep.platforms]\nlame = lame\n")
    (site / "lame.py").write_text(textwrap.dedent(LAME).replace("LAUNCHER", launcher))
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    end = subprocess.run(
        [sys.executable, "-m", "hyperep", "train", *OPTIONS, "--platform", "lame", "--ranks", "2", "--text", text],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert end.returncode == 2
    for message in messages:
        assert message in end.stderr
    assert not Path(tmp_path / "run").exists()
