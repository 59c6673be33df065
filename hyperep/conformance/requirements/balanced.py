# SPDX-License-Identifier: Apache-2.0
"""Balanced experts: hot ones are computed in several places, and nothing else changes."""

from __future__ import annotations

import numpy as np

import hyperep
from hyperep.conformance.case import Case
from hyperep.conformance.choices import CHOICES
from hyperep.conformance.requirement import Level, requirement
from hyperep.conformance.requirements.token_styles import EP, ETP, LEVELS, Problem, ep_mesh, shapes
from hyperep.exchange.balance import plan
from hyperep.platform.capabilities import Capability

PORT = "styles"
_BALANCED = (Capability.ALL_GATHER, Capability.FUNCTIONAL_CALL)
_EVEN = hyperep.Balance(slots=2, max_imbalance=1.0, rows_per_copy=0)
"""Copies wherever they make ranks more even, whatever they cost."""


def _copied(problem: Problem) -> int:
    """How many copies there must be."""
    chosen = [indices[indices < problem.experts] for indices in problem.indices]
    counts = np.stack([np.bincount(of, minlength=problem.experts) for of in chosen])
    return len(plan(counts, slots=_EVEN.slots, max_imbalance=1.0).copies)


@requirement(
    "EP-copies",
    "ExpertParallel with balance equals the unsharded experts in output and all gradients, whatever the choices: those "
    "of copies go home, and each step has the weights of that step.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(*EP, *_BALANCED),
    needs=("EP-tokens", "MOD-functional-call"),
    min_ranks=2,
)
def balanced(case: Case) -> None:
    mesh, copied = ep_mesh(case), 0
    for choices in CHOICES:
        problem = Problem(case, choices, case.ranks)
        copied += _copied(problem)
        module = problem.sharded(hyperep.ExpertParallel(balance=_EVEN), mesh)
        problem.agree(module, case.rank)
        # Once more, with other weights.
        problem.weights = [1.5 * w[::-1] for w in problem.weights]
        for handle, whole in zip(case.platform.parameters(module).values(), problem.weights, strict=True):
            part = case.platform.sharding(handle).local_slices(whole.shape)
            case.platform.assign(handle, case.tensor(np.ascontiguousarray(whole[part])))
        problem.agree(module, case.rank)
    case.is_true(copied > 0, "no choices of the suite were uneven enough to copy anything")


@requirement(
    "EP-copies-grids",
    "So does it with two levels, of which it balances the last, also with the first in chunks; and so does "
    "ExpertTensorParallel.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(*ETP, *LEVELS, *_BALANCED, Capability.ASYNC_COLLECTIVES),
    needs=("EP-copies", "EP-levels", "ETP-tokens", "EP-chunks"),
    min_ranks=4,
)
def balanced_in_grids(case: Case) -> None:
    shape = next((shape for shape in shapes(case.ranks) if min(shape) > 1), (1, case.ranks))
    case.note(mesh=shape)
    levels = case.mesh(shape, ("node", "ep"))
    for chunks in (1, 2):
        problem = Problem(case, "duplicates", case.ranks)
        style = hyperep.ExpertParallel(levels=("node", "ep"), balance=_EVEN, chunks=chunks)
        problem.agree(problem.sharded(style, levels), case.rank)
    sliced = case.mesh(shape[::-1], ("ep", "tp"))
    problem = Problem(case, "hot-rank", shape[1])
    problem.agree(problem.sharded(hyperep.ExpertTensorParallel(balance=_EVEN), sliced), sliced.get_local_rank("ep"))


@requirement(
    "EP-copies-cost",
    "Balance costs one small collective and one host copy more; where ranks are even enough nothing else, and in "
    "backward no host copy.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(*EP, *_BALANCED),
    needs=("EP-copies",),
    min_ranks=2,
)
def balanced_cost(case: Case) -> None:
    platform, rank = case.platform, case.rank
    problem = Problem(case, "hot-rank", case.ranks)
    numbers = case.tensor(problem.indices[rank])
    inputs = (case.tensor(problem.tokens[rank]), case.tensor(problem.scores[rank]))
    lenient = hyperep.Balance(slots=2, max_imbalance=float(case.ranks + 1))
    seen = {}
    for name, balance in (("without", None), ("even enough", lenient)):
        module = problem.sharded(hyperep.ExpertParallel(balance=balance), ep_mesh(case))
        with case.counting("to_host", "all_gather", "all_to_all_single") as forward:
            _, pullback = platform.vjp(lambda x, s, module=module: module(x, numbers, s), *inputs)
        with case.counting("to_host", "all_gather", "all_to_all_single") as backward:
            pullback(case.tensor(problem.cotangents[rank]))
        seen[name] = forward, backward
    case.note(calls=seen)
    (plain, plain_back), (even, even_back) = seen["without"], seen["even enough"]
    for member, more in (("to_host", 1), ("all_gather", 1), ("all_to_all_single", 0)):
        extra = even[member] - plain[member]
        case.is_true(extra == more, f"forward called {member} {extra} times more than without balance, and not {more}")
        case.is_true(even_back[member] == plain_back[member], f"backward called {member} more than without balance")
