# SPDX-License-Identifier: Apache-2.0
"""What has changed from one report to another, and which commit a suite is of."""

import dataclasses
import json
import subprocess

import pytest

from hyperep.cli import main
from hyperep.conformance import origin
from hyperep.conformance.difference import difference, told
from hyperep.conformance.report import Report, Result
from hyperep.conformance.verdict import Verdict

P, F, E, B = Verdict.PASSED, Verdict.FAILED, Verdict.EXPECTED, Verdict.BLOCKED


def report(commit="", **verdicts):
    """``A2=P`` is the verdict on requirement A at world size 2."""
    results = [Result(id=k[:-1], ranks=int(k[-1]), verdict=v, message="why" * (v is F)) for k, v in verdicts.items()]
    facts = {"distribution": "", "framework": "", "device": "cpu", "capabilities": {}, "suite": "hyperep 1"}
    facts |= {"python": "", "machine": "", "world_sizes": (1, 2), "seed": 0, "seconds": 1.0}
    return Report(platform="x", commit=commit, results=tuple(results), **facts)


@pytest.mark.parametrize(
    ("old", "new", "regressed", "lines"),
    [
        ({"A2": P}, {"A2": P}, False, ["The two reports say the same."]),
        ({"A2": P, "B2": F}, {"A2": F, "B2": P}, True, [
            "Worse:", "  A (world size 2): passed -> failed: why",
            "Better:", "  B (world size 2): failed -> passed",
        ]),
        ({"A2": F}, {"A2": B}, False, ["Better:", "  A (world size 2): failed -> blocked"]),
        ({"A2": P}, {"A2": E}, True, ["Worse:", "  A (world size 2): passed -> expected failure"]),
        ({"A1": P}, {"A1": P, "A2": P, "B1": P, "B2": P}, False, [
            "New:", "  A (world size 2): passed", "  B (world size 1, 2): passed",
        ]),
        ({"A1": P}, {"A1": P, "B1": F}, True, ["New:", "  B (world size 1): failed"]),
        ({"A1": P, "A2": P}, {"A1": P}, True, ["Not checked any more:", "  A (world size 2): passed"]),
    ],
)  # fmt: skip
def test_what_has_changed(old, new, regressed, lines):
    found = difference(report(**old), report(**new))
    assert found.regressed is regressed
    assert told(found).splitlines() == lines


def test_what_made_the_reports_is_compared_too():
    lines = told(difference(report("a" * 12, A1=P), report(A1=P))).splitlines()
    assert lines == ["Made otherwise:", f"  commit: {'a' * 12} -> -"]


def test_the_command(tmp_path, capsys):
    for name, verdict in (("old", P), ("new", F)):
        report(A1=verdict).save(tmp_path / name)
    for first, second, status in (("old", "new", 1), ("new", "old", 0), ("old", "old", 0), ("old", "none", 2)):
        with pytest.raises(SystemExit) as exited:
            main(["conformance", "diff", str(tmp_path / first), str(tmp_path / second)])
        assert exited.value.code == status
    assert "A (world size 1): passed -> failed: why" in capsys.readouterr().out


def git(folder, *arguments):
    identity = ("-c", "user.name=x", "-c", "user.email=x@x")
    done = subprocess.run(["git", "-C", folder, *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_the_checkout_and_tells_changes(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    assert origin.commit_of(package) == ""
    git(tmp_path, "init", "-q")
    (tmp_path / "other").touch()
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-qm", "x")
    assert origin.commit_of(package) == "", "an installed package inside somebody's repository is not of its commit"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "y")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert origin.commit_of(package) == commit[:12]
    (tmp_path / "other").write_text("not of the package")
    assert origin.commit_of(package) == commit[:12]
    (package / "__init__.py").write_text("changed")
    assert origin.commit_of(package) == commit[:12] + "+"


def test_what_pip_installed_from_a_checkout_tells_it(monkeypatch):
    @dataclasses.dataclass
    class Distribution:
        text: str | None

        def read_text(self, name):
            assert name == "direct_url.json"
            return self.text

    monkeypatch.setattr(origin, "commit_of", lambda folder: "")
    told_by_pip = json.dumps({"url": "x", "vcs_info": {"vcs": "git", "commit_id": "0123456789abcdef"}})
    for text, commit in ((told_by_pip, "0123456789ab"), (None, ""), ("{}", "")):
        monkeypatch.setattr("importlib.metadata.distribution", lambda name, text=text: Distribution(text))
        assert origin.suite_commit.__wrapped__() == commit
