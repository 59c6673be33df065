# SPDX-License-Identifier: Apache-2.0
"""The exchange of tokens between real gloo processes: the core's neutral cases."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "neutral"))
import token_cases

from hyperep.workloads import NAMES

GRID = [
    *(("tokens", (ranks,)) for ranks in (2, 4)),
    *(("rows", (ranks,)) for ranks in (2, 4)),
    *(("levels", shape) for shape in ((1, 2), (2, 2))),
    *(("etp", shape) for shape in ((2, 1), (2, 2))),
    *((way, (ranks,)) for way in ("2 chunks", "3 chunks") for ranks in (2, 4)),
    ("more chunks than tokens", (4,)),
    ("levels in chunks", (2, 2)),
    ("etp in chunks", (2, 2)),
    *(("balanced", (ranks,)) for ranks in (2, 4)),
    ("balanced levels", (2, 2)),
    ("balanced levels in chunks", (2, 2)),
    ("balanced etp", (2, 2)),
]
TRANSPOSED = [("tokens", (2,)), ("2 chunks", (2,)), ("levels", (2, 2)), ("etp", (2, 2))]


@pytest.fixture
def world(request):
    """Ranks for meshes of so many."""
    return lambda shape: request.getfixturevalue({2: "two", 4: "four"}[shape[0] * (shape[1] if shape[1:] else 1)])


@pytest.mark.parametrize(("way", "shape"), GRID)
@pytest.mark.parametrize("kind", ["both", "tokens"])
def test_agrees_with_a_loop(world, kind, way, shape):
    world(shape).run(token_cases.agrees, way, shape, kind)


@pytest.mark.parametrize(("way", "shape"), [entry for entry in GRID if "balanced" in entry[0]])
@pytest.mark.parametrize("workload", NAMES)
def test_agrees_with_a_loop_under_uneven_loads(world, workload, way, shape):
    world(shape).run(token_cases.agrees, way, shape, "both", False, workload)


@pytest.mark.parametrize(("way", "shape"), TRANSPOSED)
def test_inputs_that_are_not_contiguous(world, way, shape):
    world(shape).run(token_cases.agrees, way, shape, "both", True)


def test_the_plan_of_copies(platform):
    token_cases.plan_is_that_of_the_loop(platform)


@pytest.mark.parametrize(("way", "shape"), [("tokens", (2,)), ("levels", (2, 2)), ("3 chunks", (2,))])
def test_costs(world, way, shape):
    world(shape).run(token_cases.costs, way, shape)


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("what", token_cases.BAD)
def test_bad_input_is_an_error_on_every_rank(two, what, at):
    two.run(token_cases.bad_input_is_an_error_on_every_rank, what, at)


def test_limited_groups_bound_the_copies(four):
    four.run(token_cases.limited_groups_bound_the_copies, 2, 1)


def test_same_bits_again(two):
    two.run(token_cases.same_bits_again)
