# SPDX-License-Identifier: Apache-2.0
"""The suite finds every faulty platform, by the requirement that names its fault."""

import pytest
from mutants import MUTANTS, target

from hyperep.conformance.suite import check_target, failures_first
from hyperep.conformance.verdict import Verdict


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_is_found_by_the_requirement_that_names_it(name):
    mutant = MUTANTS[name]
    report = check_target(target(name), [mutant.ranks], only=[mutant.requirement], deadline=mutant.deadline)
    result = next(r for r in report.results if r.id == mutant.requirement)
    assert result.verdict is Verdict.FAILED, failures_first(report.results)
    assert mutant.says in result.message + result.detail
    assert not report.passed
    assert report.conforms is None


def test_there_are_enough_of_them():
    assert len(MUTANTS) >= 25
