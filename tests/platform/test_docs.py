# SPDX-License-Identifier: Apache-2.0
"""The page about platforms names everything that a user can see or set."""

import re
from pathlib import Path

import pytest

import hyperep
from hyperep.cli.platforms import as_record
from hyperep.platform.candidate import Candidate, State
from hyperep.platform.spec import API_OLDEST, API_VERSION

PAGE = (Path(__file__).parents[2] / "docs" / "platforms.md").read_text(encoding="utf-8")
SOURCES = [path.read_text(encoding="utf-8") for path in Path(hyperep.__file__).parent.rglob("*.py")]
VARIABLES = sorted(set(re.findall(r'"(HYPEREP_[A-Z_]+)"', "\n".join(SOURCES))))


def test_variables_are_found():
    assert {"HYPEREP_PLATFORM", "HYPEREP_BLOCK", "HYPEREP_TRACEBACK"} <= set(VARIABLES)


@pytest.mark.parametrize("variable", VARIABLES)
def test_each_environment_variable_has_a_row(variable):
    assert f"| `{variable}` |" in PAGE


@pytest.mark.parametrize("state", State)
def test_each_state_has_a_row(state):
    assert f"| {state.value} |" in PAGE


def test_each_key_of_the_json_is_named():
    keys = as_record(Candidate(name="alpha", state=State.BLOCKED, reason=""))
    assert [key for key in keys if f"`{key}`" not in PAGE] == []


def test_the_page_says_which_versions_of_the_protocol_are_supported():
    assert f"This hyperep supports the versions {API_OLDEST} and {API_VERSION}." in PAGE
    assert f"\n| {API_VERSION} | " in PAGE
