# SPDX-License-Identifier: Apache-2.0
"""Each fault is named with its cause, once, and nothing else is said."""

import pytest
from faults import FAULTS
from hand_written import subject_of

from hyperep.audit import check_layer


@pytest.mark.parametrize("layer", FAULTS, ids=lambda cls: cls.__name__)
def test_a_known_fault_is_named(layer):
    cause, quantity, where, words = FAULTS[layer]
    report = check_layer(subject_of(layer), (2, 4), deadline=5.0)
    assert len(report.findings) == 1, [finding.headline for finding in report.findings]
    (finding,) = report.findings
    assert (finding.cause, finding.where) == (cause, where)
    assert quantity in finding.quantities
    told = f"{finding.headline} {finding.reason}"
    assert all(word in told for word in words), told
    assert finding.certainty in ("certain", "likely")
    assert {seen.ranks for seen in finding.seen} == {2, 4}


def test_there_are_enough_of_them():
    assert len(FAULTS) >= 25
