# SPDX-License-Identifier: Apache-2.0
"""Each fault is named with its cause, once, and nothing else is said."""

import numpy as np
import pytest
from faults import FAULTS, ExpertsSummedNotAveraged, changed_backward
from hand_written import Layer, subject_of

from hyperep.audit import check_layer

# At two or at four ranks, in turn, which keeps this short; what depends on their number differs between the two.
CASES = [(layer, (2, 4)[i % 2]) for i, layer in enumerate(FAULTS)]


@pytest.mark.parametrize(("layer", "ranks"), CASES, ids=[f"{layer.__name__}@{ranks}" for layer, ranks in CASES])
def test_a_known_fault_is_named(layer, ranks):
    cause, quantity, where, words = FAULTS[layer]
    report = check_layer(subject_of(layer), (ranks,), deadline=5.0)
    assert len(report.findings) == 1, [finding.headline for finding in report.findings]
    (finding,) = report.findings
    assert (finding.cause, finding.where) == (cause, where)
    assert quantity in finding.quantities
    told = f"{finding.headline} {finding.reason}"
    assert all(word in told for word in words), told
    assert finding.certainty in ("certain", "likely")


def test_what_is_wrong_at_several_numbers_of_ranks_is_one_finding():
    report = check_layer(subject_of(ExpertsSummedNotAveraged), (1, 2, 4), only=("one-row", "balanced", "mixed"))
    (finding,) = report.findings
    assert {seen.ranks for seen in finding.seen} == {2, 4}
    assert (finding.equals, finding.certainty, finding.condition) == (("R",), "certain", "")


def test_there_are_enough_of_them():
    assert len(FAULTS) >= 25


class CotangentsCrossed(Layer):
    """Half of each row's cotangent comes from the row behind it, in no known way."""

    def combine(self, returned, back, scores, chosen):
        crossed = changed_backward(lambda g: g + 0.5 * np.roll(g, -1, axis=0))
        return super().combine(crossed(returned), back, scores, chosen)


class GradientsCrossed(Layer):
    """The same on the way from the experts to the tokens."""

    def rows(self, x, sent):
        return changed_backward(lambda g: g + 0.5 * np.roll(g, -1, axis=0))(super().rows(x, sent))


@pytest.mark.parametrize(
    ("layer", "quantities", "place"),
    [
        (CotangentsCrossed, {"experts", "tokens"}, "between the weighted sum and the experts"),
        (GradientsCrossed, {"tokens"}, "between the experts and the tokens"),
    ],
)
def test_of_an_unknown_fault_it_is_told_where_it_lies(layer, quantities, place):
    (finding,) = check_layer(subject_of(layer), (2,), only=("balanced", "mixed", "unequal")).findings
    assert (finding.cause, set(finding.quantities), finding.certainty) == ("unknown", quantities, "unknown")
    assert place in finding.reason
