# SPDX-License-Identifier: Apache-2.0
"""The audit for pytest: ``pytest --pyargs hyperep.audit --hyperep-audit=module:name --hyperep-world-size=1,2,4``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from hyperep.audit.report import AuditReport
from hyperep.audit.run import check_layer
from hyperep.audit.text import as_text

_key: pytest.StashKey[AuditReport] = pytest.StashKey()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each number of ranks; all are of one audit, so that a cause is told once."""
    if not metafunc.config.getoption("--hyperep-audit"):
        raise pytest.UsageError("say which layer to check: --hyperep-audit=module:name")
    text = metafunc.config.getoption("--hyperep-world-size")
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise pytest.UsageError(f"--hyperep-world-size={text}: give numbers of ranks such as 1,2,4") from None
    metafunc.parametrize("ranks", sizes)


def test_layer(ranks: int, pytestconfig: pytest.Config) -> None:
    """Nothing wrong is found on so many ranks."""
    report = _report(pytestconfig)
    wrong = [finding for finding in report.findings if ranks in {seen.ranks for seen in finding.seen}]
    if wrong:
        console = Console(width=110, no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(as_text(report))
        pytest.fail(capture.get(), pytrace=False)


def _report(config: pytest.Config) -> AuditReport:
    found = config.stash.get(_key, None)
    if found is None:
        sys.path.insert(0, os.getcwd())
        options = {name: config.getoption(f"--hyperep-{name}") for name in ("seed", "deadline")}
        sizes = [int(part) for part in config.getoption("--hyperep-world-size").split(",")]
        found = config.stash[_key] = check_layer(config.getoption("--hyperep-audit"), sizes, **options)
        if config.getoption("--hyperep-report"):
            found.save(Path(config.getoption("--hyperep-report")))
    return found
