# SPDX-License-Identifier: Apache-2.0
"""Each check of each architecture, through both doors; and each check with a fault that it must notice."""

import json
import pathlib
import re
from typing import get_args

import architectures
import checks
import pytest
from doors import Door
from faults import Fault
from limits import limit_of

DOORS = get_args(Door)

TOLERANCE = {"save": 2e-3, "Trainer": 2e-3}
"""After steps weights are compared by how far they have gone, beside which their own rounding counts."""

FAULTS = get_args(Fault)


def cells():
    """Reading by owners is a way of the second door; through the first transformers reads."""
    return [(check, door) for check in checks.CHECKS for door in DOORS if (check, door) != ("read by owners", DOORS[0])]


def _found(ranks, check, architecture, door, directory, fault=None):
    """The largest deviation over all ranks, or the limit that all of them met."""
    results = ranks.run(checks.checked, check, architecture, door, str(directory), fault)
    if isinstance(results[0], str):
        assert set(results) == {results[0]}
        return results[0]
    return max((value, what) for result in results for what, value in result.items())


def _noted(ranks, check, architecture, door, directory, matrix):
    found = _found(ranks, check, architecture, door, directory)
    expected = limit_of(check, architecture, door)
    if isinstance(found, str):
        limit = limit_of(check, architecture, door, told=found)
        assert limit is not None, f"a limit that is not known: {found}"
        matrix.note(architecture, check, door, limit.why)
    else:
        assert expected is None, f"the limit {expected.told!r} is gone, and the check passes: {found}"
        assert found[0] < TOLERANCE.get(check, 1e-5), found
        matrix.note(architecture, check, door, None)


@pytest.mark.parametrize(("check", "door"), cells())
@pytest.mark.composes("stock models", "every architecture and tool in [the table](transformers.md), through both doors")
@pytest.mark.composes("stock models", "transformers' `Trainer`, with clipping and accumulation")
@pytest.mark.composes("recompute", "stock models of transformers, reentrant and not")
@pytest.mark.composes("inference", "`generate` of stock models with prompts of different lengths")
@pytest.mark.composes("LoRA", "on attention, routers and experts of stock models")
def test_as_the_whole_model(two, check, door, architecture, tmp_path, matrix):
    _noted(two, check, architecture, door, tmp_path, matrix)


@pytest.mark.parametrize(
    ("check", "door"), [cell for cell in cells() if cell[0] in ("logits, loss, gradients", "read by owners")]
)
def test_as_the_whole_model_over_four_ranks(four, check, door, architecture, tmp_path, matrix):
    _noted(four, check, architecture, door, tmp_path, matrix)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("check", "door"), cells())
def test_faults_are_noticed(two, check, door, fault, examined, tmp_path):
    found = _found(two, check, examined, door, tmp_path, fault)
    assert isinstance(found, str) == (limit_of(check, examined, door) is not None), found
    assert isinstance(found, str) or found[0] > 0.01, found


def test_the_page_shows_what_is_tested():
    docs = pathlib.Path(__file__).parents[3] / "docs"
    recorded = json.loads((docs / "architectures.json").read_text())
    assert sorted(recorded["cells"]) == sorted(architectures.ARCHITECTURES)
    for architecture, row in recorded["cells"].items():
        assert {(check, door) for check, doors in row.items() for door in doors} == set(cells())
        for check, doors in row.items():
            for door, why in doors.items():
                assert (why is None) == (limit_of(check, architecture, door) is None), (architecture, check, door)
    page = (docs / "transformers.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|", page[page.index("## Architectures") :], flags=re.MULTILINE)
    assert listed == sorted(architectures.ARCHITECTURES)
