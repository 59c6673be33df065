# SPDX-License-Identifier: Apache-2.0
"""The template for authors: rendered, installed in an environment of its own, listed, and told what to write next."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A directory with a rendered platform, and a virtual environment that holds it, hyperep and what these need."""
    here = tmp_path_factory.mktemp("author")
    answers = ["--data", "name=mine", "--data", "framework=Mine", "--defaults", "--quiet"]
    run(sys.executable, "-m", "copier", "copy", *answers, ROOT / "plugins" / "template", here / "my-platform", cwd=here)
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


@pytest.mark.timeout(900)
def test_a_rendered_platform_is_tested_by_its_own_tests(environment):
    out = run(environment / "venv/bin/python", "-m", "pytest", "-q", "-x", cwd=environment / "my-platform", code=1)
    assert "HOST-roundtrip" in out
    # The reference platform conforms in an environment that was installed and not checked out.
    options = ["--platform", "loopback", "--world-size", "2"]
    assert "loopback conforms" in run(environment / "venv/bin/hyperep", "conformance", "run", *options, cwd=environment)
