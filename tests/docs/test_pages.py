# SPDX-License-Identifier: Apache-2.0
"""The examples in the docs and in docstrings, run as written."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
MODULES = [
    "hyperep.permutation",
    "hyperep.platform.array_names",
    "hyperep.styles.expert",
    "hyperep.styles.linear",
    "hyperep.styles.parallelize",
]


@pytest.mark.parametrize("page", ["moe.md", "styles.md"])
def test_page(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    # One namespace for the whole page; a fence would otherwise count as expected output.
    examples = "\n\n".join(re.findall(r"^```pycon\n(.*?)^```", text, flags=re.M | re.S))
    test = doctest.DocTestParser().get_doctest(examples, {}, page, str(DOCS / page), 0)
    assert len(test.examples) > 10
    assert doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
