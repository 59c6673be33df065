# SPDX-License-Identifier: Apache-2.0
"""What users see of an audit: the command, the JSON, the page, pytest; and what they did wrong."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from faults import EarlyReturnWithoutTokens, ExpertsSummedNotAveraged, OrderKeptOnTheLayer
from hand_written import Layer, subject_of

from hyperep.audit import check_layer
from hyperep.audit.page import as_html
from hyperep.cli import main

HERE = Path(__file__).parent

# What the command finds by name.
right = subject_of(Layer)
summed = subject_of(ExpertsSummedNotAveraged)
FEW = ("--only", "one-row", "--only", "mixed")


def run_cli(*arguments):
    with pytest.raises(SystemExit) as exited:
        main(["audit", *arguments])
    return exited.value.code


def test_the_command_line(tmp_path, capsys):
    report, page = tmp_path / "r.json", tmp_path / "r.html"
    options = ("--world-size", "1,2", "--json", str(report), "--html", str(page), "--scripts", str(tmp_path), *FEW)
    assert run_cli("run", "--subject", "test_reports:summed", *options) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "1. The gradients of the experts are 2.000 times too large on all experts" in shown
    assert "Summed over ranks, and not averaged as claimed." in shown
    data = json.loads(report.read_text())
    (finding,) = data["findings"]
    assert (data["clean"], data["schema"], data["reference"]) == (False, 1, "test_reports:summed")
    assert "no script of finding 1: scripts are written of layers of PyTorch only" in shown
    assert (finding["cause"], finding["equals"], finding["certainty"]) == ("scaled", ["R"], "certain")
    assert finding["factor"] == pytest.approx(2.0)
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert run_cli("run", "--subject", "test_reports:right", "--world-size", "2", *FEW) == 0
    assert "nothing wrong found" in capsys.readouterr().out
    assert run_cli("list") == 0
    assert "empty-expert" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--subject", "nowhere:layer"), "No module named 'nowhere'"),
        (("--subject", "test_reports:nothing"), "no attribute 'nothing'"),
        (("--subject", "test_reports"), "is not a reference"),
        (("--subject", "json:dumps"), "which is no subject"),
        (("--subject", "test_reports:right", "--world-size", "3"), "divide experts=8"),
        (("--subject", "test_reports:right", "--world-size", "two"), "--world-size two"),
        (("--subject", "test_reports:right", "--only", "nothing"), "there is no examination 'nothing'"),
        (("--subject", "test_reports:right", "--json", "nowhere/r.json"), "there is no folder"),
    ],
)
def test_what_the_user_did_wrong_is_one_message(capsys, options, message):
    assert run_cli("run", *options) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("hyperep: error: ")
    assert message in errors
    assert errors.count("\n") == 1


def test_the_smallest_input_is_told():
    (finding,) = check_layer(summed, (2, 4), only=("balanced", "mixed")).findings
    assert (finding.smallest.ranks, sum(map(sum, finding.smallest.tokens))) == (2, 1)
    several = check_layer(subject_of(OrderKeptOnTheLayer), (2,), only=("mixed", "interleaved")).findings
    assert several[0].smallest.examination == "interleaved"
    assert sum(map(sum, several[0].smallest.tokens)) <= 8, "two tokens a batch and rank can be exchanged"


def test_a_layer_without_a_name_is_called_as_it_is_found(monkeypatch):
    monkeypatch.setitem(globals(), "nameless", dataclasses.replace(right, name=""))
    report = check_layer("test_reports:nameless", (1,), only=("one-row", "unequal"))
    assert report.subject == "test_reports:nameless"
    assert [(line.outcome, line.message) for line in report.examinations] == [
        ("ok", ""),
        ("not examined", "it takes 2 ranks"),
    ]


def test_a_page_needs_nothing_from_elsewhere_and_text_stays_text():
    report = check_layer(subject_of(EarlyReturnWithoutTokens), (2,), only=("one-row",))
    page = as_html(report)
    assert "http" not in page.replace("<!DOCTYPE", "")
    assert "src=" not in page
    assert "<script" not in page
    assert "rank 0" in page
    assert "no script: " in page
    assert ">seen at 2 ranks</dt><dd>one-row<" in page
    assert "left unexplained" not in page, "nothing was fitted"
    (finding,) = report.findings
    hostile = as_html(type(report)(**{**vars(report), "subject": "<b>&x", "findings": (finding,)}))
    assert "&lt;b&gt;&amp;x" in hostile
    assert "<b>" not in hostile
    assert report._repr_html_() in page


def test_pytest_runs_an_audit(tmp_path):
    options = ["--hyperep-world-size=1,2", "--hyperep-report=r.json"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", "hyperep.audit"]
    (tmp_path / "layers.py").write_text(
        f"import sys\nsys.path.insert(0, {str(HERE)!r})\nfrom faults import *\nfrom hand_written import subject_of\n"
        "summed = subject_of(ExpertsSummedNotAveraged)\n"
    )
    run = [*command, *options, "--hyperep-audit=layers:summed"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout
    assert "not averaged as claimed" in done.stdout
    assert json.loads((tmp_path / "r.json").read_text())["world_sizes"] == [1, 2]
    without = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "--hyperep-audit=module:name" in without.stdout + without.stderr
