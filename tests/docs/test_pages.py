# SPDX-License-Identifier: Apache-2.0
"""The examples in the docs and in docstrings, run as written."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
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


PAGES = [
    *sorted(DOCS.glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(ROOT.glob("backends/*/README.md")),
    *sorted(ROOT.glob("plugins/*/README.md")),
]


def anchors(page):
    """What a link into the page may end in: its headings, as Markdown's pages name them, and anchors of its own."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ +(.+)$", text, flags=re.M)
    named = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
    return named | set(re.findall(r'<a id="([^"]+)"', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: there is no {target}"
        assert not anchor or anchor in anchors(target), f"{link}: {target.name} has no such heading"


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
