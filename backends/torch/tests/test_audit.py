# SPDX-License-Identifier: Apache-2.0
"""The audit on layers of PyTorch, on real ranks: faults that only a framework has, and right layers."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import audited
import pytest
from ranks import OnCpu

from hyperep.audit import SWIGLU, Claims, check_layer
from hyperep.audit.examinations import examinations
from hyperep.audit.ranks import PooledRanks
from hyperep.audit.run import audit_on
from hyperep.audit.shown import Shown
from hyperep.audit.subject import NotOffered
from hyperep.launch.pool import RankPool


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(OnCpu(), "torch", 2) as pool:
        yield pool


def audit(pool: RankPool, kind: str, name: str, deadline: float = 10.0):
    entry = getattr(audited, kind)[name]
    subject = entry if kind == "RIGHT" else entry[0]
    return audit_on(PooledRanks(pool, subject, pool.ranks, deadline), subject, examinations())


@pytest.mark.parametrize("name", audited.RIGHT)
def test_a_right_layer_is_not_accused(pool, name):
    findings, lines = audit(pool, "RIGHT", name)
    assert not findings, [finding.headline for finding in findings]
    examined = {line.examination for line in lines if line.outcome == "ok"}
    assert {"recompute", "frozen-experts", "frozen-router", "memory", "optimizer", "two-layers"} <= examined
    assert ("checkpoint" in examined) == (name == "sgd and checkpoints")


@pytest.mark.parametrize("name", [name for name in audited.FAULTS if name != "EarlyReturn"])
def test_a_known_fault_is_named(pool, name):
    _, cause, quantity, word = audited.FAULTS[name]
    findings, _ = audit(pool, "FAULTS", name)
    assert len(findings) == 1, [finding.headline for finding in findings]
    assert (findings[0].cause, findings[0].quantities[0]) == (cause, quantity)
    assert word in f"{findings[0].headline} {findings[0].reason}"


def test_a_deadlock_ends_with_the_place_of_every_rank(pool):
    _, cause, quantity, word = audited.FAULTS["EarlyReturn"]
    subject = audited.FAULTS["EarlyReturn"][0]
    ranks = PooledRanks(pool, subject, pool.ranks, 8.0)
    mixed, one_row = examinations(("mixed",)) + examinations(("one-row",))
    findings, _ = audit_on(ranks, subject, (mixed, one_row))  # what hangs comes last, so that ranks start only once
    assert [(f.cause, f.quantities) for f in findings] == [(cause, (quantity,))]
    assert word in findings[0].condition
    assert [place.partition(":")[0] for place in findings[0].places] == ["rank 0", "rank 1"]
    assert any("audit_layer.py" in place for place in findings[0].places), findings[0].places


def in_forward(module, tokens):
    return module(tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"make": lambda claims: None}, "make cannot be named"),
        ({"reduce": lambda layer: None}, "reduce cannot be named"),
        ({"call": functools.partial(in_forward)}, "call cannot be named"),
        ({"claims": Claims(capacity=1.0)}, "know neither capacities"),
        ({"claims": Claims(expert=replace(SWIGLU))}, "no experts but"),
    ],
)
def test_why_there_is_no_script_is_told(changes, message):
    subject = replace(audited.right, **changes)
    shown = Shown(title="", reason="", ranks=2, layers=1, actions=(), tokens={}, cotangents={}, seed=0)
    with pytest.raises(NotOffered, match=message):
        subject.script(shown)


EXAMPLE = Path(__file__).parents[1] / "examples" / "audit_layer.py"


def test_a_script_shows_it_without_this_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HYPEREP_TORCH_DEVICE", "cpu")
    text = EXAMPLE.read_text()
    wrong = text.replace(
        "weight.grad)\n\n\ndef norm", "weight.grad)\n    layer.w2.grad *= dist.get_world_size()\n\n\ndef norm"
    )
    assert wrong != text
    (tmp_path / "wrong_layer.py").write_text(wrong)
    (finding,) = check_layer("wrong_layer:subject", (2,), only=("balanced",)).findings
    assert (finding.cause, finding.where, finding.quantities) == ("scaled", "weight", ("experts",))
    assert "import hyperep" not in finding.script
    assert "from hyperep" not in finding.script
    script = tmp_path / "shows.py"
    script.write_text(finding.script)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len([line for line in lines if line.startswith("WRONG gradient of w2")]) == 2, done.stdout
    assert "nan" not in done.stdout
    assert not [line for line in lines if line.startswith("WRONG") and "w2" not in line], done.stdout
    assert all(line.endswith("2.0000") for line in lines if line.startswith("WRONG"))
