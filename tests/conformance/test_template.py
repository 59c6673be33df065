# SPDX-License-Identifier: Apache-2.0
"""The template for authors: rendered, installed in an environment of its own, listed, and told what to write next."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hyperep.platform.capabilities import Capability

pytest.importorskip("copier", reason="pip install copier, which renders the template")

ROOT = Path(__file__).parents[2]
STRANGERS = ("PYTHONPATH", "HYPEREP", "PIP_CONSTRAINT", "VIRTUAL_ENV", "RANK", "WORLD_SIZE")


def run(*command, cwd, code=0, timeout=600):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(STRANGERS)}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == code, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_capability_is_there_to_be_declared():
    (spec,) = (ROOT / "plugins" / "template" / "template").glob("*/spec.py*")
    declared = re.findall(r"^    Capability\.(\w+): Support", spec.read_text(encoding="utf-8"), flags=re.M)
    assert sorted(declared) == sorted(Capability.__members__)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A directory with a rendered platform, and a virtual environment that holds it, hyperep and what these need."""
    here = tmp_path_factory.mktemp("author")
    answers = {"name": "mine", "framework": "Mine", "framework_distribution": "autograd>=1.8"}
    data = [word for name, answer in answers.items() for word in ("--data", f"{name}={answer}")]
    run(
        sys.executable,
        "-m",
        "copier",
        "copy",
        *data,
        "--defaults",
        "--quiet",
        ROOT / "plugins" / "template",
        here / "my-platform",
        cwd=here,
    )
    run(sys.executable, "-m", "venv", here / "venv", cwd=here)
    run(here / "venv/bin/pip", "install", "-q", ROOT, f"{here / 'my-platform'}[test]", cwd=here)
    return here


@pytest.mark.timeout(900)
def test_the_stub_is_listed_and_told_what_to_write_next(environment):
    listed = run(environment / "venv/bin/hyperep", "platforms", "--json", cwd=environment)
    assert '"name": "mine"' in listed
    assert '"state": "viable"' in listed

    report = environment / "report.json"
    options = ["--platform", "mine", "--world-size", "1,2", "--report", report]
    out = run(environment / "venv/bin/hyperep", "conformance", "run", *options, cwd=environment, code=1)
    lines = out.splitlines()
    todo = lines[1 : lines.index("")]
    assert len(todo) <= 5, out
    assert todo[0].startswith("  HOST-roundtrip (world size 1, 2): NotImplementedError: from_host: copy a NumPy array")
    assert "blocks" in todo[0]
    assert "mine does not conform at world size 1, 2" in lines[-1]
    assert report.exists()


def test_what_is_rendered_is_the_author_s_own(environment):
    mine = environment / "my-platform"
    assert '"autograd>=1.8"' in (mine / "pyproject.toml").read_text()
    launcher = (mine / "hyperep_mine" / "launcher.py").read_text()
    assert set(re.findall(r'"(HYPEREP_\w+)"', launcher)) == {f"HYPEREP_MINE_{x}" for x in ("RANK", "RANKS", "ADDRESS")}
    assert '"WORLD_SIZE"' not in launcher, "a process of torchrun is no rank of this platform"
    workflow = (mine / ".github" / "workflows" / "conformance.yml").read_text()
    assert "hyperep conformance run --platform mine --world-size 1,2,3,4" in workflow
    assert "python-version: ${{ matrix.python }}\n" in workflow
    assert "actions/upload-artifact" in workflow
    left = [p.name for p in mine.rglob("*") if p.is_file() and re.search(r"\{%|\[\[|name\.", p.read_text())]
    assert left == [], "nothing of the template's language is left"


@pytest.mark.timeout(900)
def test_a_rendered_platform_is_tested_by_its_own_tests(environment):
    out = run(environment / "venv/bin/python", "-m", "pytest", "-q", "-x", cwd=environment / "my-platform", code=1)
    assert "HOST-roundtrip" in out
    # The reference platform conforms in an environment that was installed and not checked out.
    options = ["--platform", "loopback", "--world-size", "2"]
    assert "loopback conforms" in run(environment / "venv/bin/hyperep", "conformance", "run", *options, cwd=environment)
