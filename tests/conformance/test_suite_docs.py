# SPDX-License-Identifier: Apache-2.0
"""The documentation of the suite and of the protocol is complete, and its generated parts are up to date."""

import inspect
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from hyperep.conformance.catalogue import lacking
from hyperep.conformance.report import WORLD_SIZES, Report
from hyperep.platform import hookspecs
from hyperep.platform.protocol import Platform

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCS / "writing-a-platform.md").read_text()


def members():
    return [name for name in vars(Platform) if not name.startswith("_")]


def hooks():
    return [name for name, f in inspect.getmembers(hookspecs, inspect.isfunction) if hasattr(f, "hyperep_spec")]


@pytest.mark.parametrize("member", members())
def test_every_member_of_the_protocol_has_a_section(member):
    heading = re.search(rf"^#### `{member}`\n\n\S", GUIDE, flags=re.MULTILINE)
    assert heading, f"docs/writing-a-platform.md has no section on {member}"


def test_every_hook_has_a_section():
    assert hooks() == ["hyperep_platform_spec"]
    for hook in hooks():
        assert re.search(rf"^### Hook `{hook}`\n\n\S", GUIDE, flags=re.MULTILINE), hook


def test_every_section_is_about_something_that_exists():
    assert set(re.findall(r"^#### `(\w+)`", GUIDE, flags=re.MULTILINE)) == set(members())


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("conformance.md", "requirements"),
        ("platforms.md", "matrix"),
        ("torch.md", "composition"),
        ("transformers.md", "architectures"),
    ],
)
def test_generated_parts_are_up_to_date(page, name):
    generate = runpy.run_path(str(DOCS / "generate.py"))
    part = generate["parts"]()[page, name]
    assert generate["replaced"](page, name, part) == (DOCS / page).read_text(), "run: python docs/generate.py"


@pytest.mark.parametrize("path", sorted((DOCS / "reports").glob("*.json")), ids=lambda path: path.name)
def test_every_report_is_one_of_this_suite(path):
    missing = lacking(Report.load(path).ran)
    assert not missing, f"run the suite on this platform again: its report lacks {missing}"


def test_the_pages_are_not_made_of_reports_that_lack_requirements(tmp_path):
    docs = tmp_path / "docs"
    (docs / "reports").mkdir(parents=True)
    for name in ("generate.py", "composition.py", "architectures.py", "architectures.json"):
        (docs / name).write_text((DOCS / name).read_text())
    for name in ("conformance.md", "platforms.md", "torch.md", "transformers.md"):
        (docs / name).write_text((DOCS / name).read_text())
    whole = Report.load(DOCS / "reports" / "loopback.json")
    results = tuple(r for r in whole.results if r.id != "HOST-several")
    lame = Report(**{**vars(whole), "platform": "lame", "results": results})
    lame.save(docs / "reports" / "lame.json")
    done = subprocess.run([sys.executable, docs / "generate.py"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert re.search(r"run the suite again:\n  lame.json lacks .*\bHOST-several\b", done.stderr)
    assert (docs / "platforms.md").read_text() == (DOCS / "platforms.md").read_text()


def test_the_platforms_that_must_conform_do():
    reports = {path.stem: Report.load(path) for path in (DOCS / "reports").glob("*.json")}
    for name in ("loopback", "torch"):
        assert reports[name].conforms
        assert set(WORLD_SIZES) <= set(reports[name].world_sizes)
