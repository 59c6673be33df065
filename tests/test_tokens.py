# SPDX-License-Identifier: Apache-2.0
"""The exchange of tokens on loopback; the cases themselves are neutral."""

import functools

import pytest
import token_cases

import hyperep
from hyperep.loopback import run
from hyperep.moe import GroupedExperts
from hyperep.workloads import NAMES

GRID = [
    *(("tokens", (ranks,)) for ranks in (1, 2, 4)),
    *(("rows", (ranks,)) for ranks in (1, 2, 4)),
    *(("levels", shape) for shape in ((1, 1), (2, 1), (1, 2), (2, 2))),
    *(("etp", shape) for shape in ((1, 2), (2, 1), (2, 2))),
    ("etp levels", (2, 2, 2)),
    *(("2 chunks", (ranks,)) for ranks in (1, 2, 4)),
    *(("3 chunks", (ranks,)) for ranks in (2, 4)),
    ("more chunks than tokens", (4,)),
    *(("levels in chunks", shape) for shape in ((2, 1), (2, 2))),
    ("etp in chunks", (2, 2)),
    *(("balanced", (ranks,)) for ranks in (1, 2, 4)),
    *(("balanced levels", shape) for shape in ((1, 2), (2, 2))),
    ("balanced levels in chunks", (2, 2)),
    ("balanced etp", (2, 2)),
]


def on(ranks, case, *arguments, **options):
    run(functools.partial(_call, case, arguments, options), ranks)


def _call(case, arguments, options, platform):
    case(platform, *arguments, **options)


def size(shape):
    return functools.reduce(lambda a, b: a * b, shape)


@pytest.mark.parametrize(("way", "shape"), GRID)
@pytest.mark.parametrize("kind", ["both", "tokens"])
def test_agrees_with_a_loop(kind, way, shape):
    on(size(shape), token_cases.agrees, way, shape, kind)


@pytest.mark.parametrize(("way", "shape"), [entry for entry in GRID if "balanced" in entry[0]])
@pytest.mark.parametrize("workload", NAMES)
def test_agrees_with_a_loop_under_uneven_loads(workload, way, shape):
    on(size(shape), token_cases.agrees, way, shape, workload=workload)


@pytest.mark.parametrize(("way", "shape"), [("tokens", (2,)), ("2 chunks", (2,)), ("levels", (2, 2)), ("etp", (2, 2))])
def test_inputs_that_are_not_contiguous(way, shape):
    on(size(shape), token_cases.agrees, way, shape, transposed=True)


def test_the_plan_of_copies():
    on(1, token_cases.plan_is_that_of_the_loop)


@pytest.mark.parametrize(
    ("way", "shape"),
    [
        *(("tokens", (2,)), ("tokens", (4,)), ("levels", (2, 2))),
        *(("3 chunks", (2,)), ("3 chunks", (4,)), ("levels in chunks", (2, 2))),
    ],
)
def test_costs(way, shape):
    on(size(shape), token_cases.costs, way, shape)


@pytest.mark.parametrize(("way", "shape"), [("tokens", (2,)), ("tokens", (4,)), ("levels", (2, 2))])
def test_bytes_on_the_wire(way, shape):
    on(size(shape), token_cases.bytes_on_the_wire, way, shape)


@pytest.mark.parametrize(("nodes", "top_groups"), [(2, 1), (4, 2)])
def test_limited_groups_bound_the_copies(nodes, top_groups):
    on(4, token_cases.limited_groups_bound_the_copies, nodes, top_groups)


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("what", token_cases.BAD)
@pytest.mark.parametrize("chunks", [1, 3])
def test_bad_input_is_an_error_on_every_rank(chunks, what, at):
    on(2, token_cases.bad_input_is_an_error_on_every_rank, what, at, chunks)


@pytest.mark.parametrize("chunks", [1, 3])
def test_same_bits_again(chunks):
    on(4, token_cases.same_bits_again, chunks)


def test_the_way_of_rows_has_one_level():
    with pytest.raises(ValueError, match="one level"):
        hyperep.ExpertParallel(exchange="rows", levels=("node", "ep"))
    with pytest.raises(ValueError, match="'tokens' or 'rows'"):
        hyperep.ExpertParallel(exchange="token")
    with pytest.raises(ValueError, match="each once"):
        hyperep.ExpertParallel(levels=("ep", "ep"))


def test_a_module_that_takes_rows_is_not_called_with_tokens():
    def call(platform):
        experts = GroupedExperts(platform, 4, 4, 4)
        experts.takes = "rows"
        mesh = hyperep.init_device_mesh(platform, (1,), ("ep",))
        hyperep.ExpertParallel().apply(experts, mesh)
        tokens = platform.from_host(token_cases.routing(0)[0][:, :4])
        with pytest.raises(TypeError, match=r"3 positional inputs(.|\n)*two kinds of experts"):
            experts(tokens, tokens, tokens)
        other = GroupedExperts(platform, 4, 4, 4)
        other.takes = "pairs"
        with pytest.raises(ValueError, match="declares takes='pairs'"):
            hyperep.ExpertParallel().apply(other, mesh)

    run(call, 1)


def test_steps_of_a_subclass_see_every_call():
    on(2, token_cases.steps_of_a_subclass_see_every_call)
