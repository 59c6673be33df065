# SPDX-License-Identifier: Apache-2.0
"""Each parallel style called with tokens, against the unsharded experts, which every rank computes by NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

import hyperep
from hyperep.conformance import oracle
from hyperep.conformance.case import Case
from hyperep.conformance.choices import CHOICES, TOP_K
from hyperep.conformance.requirement import Level, requirement
from hyperep.moe import GroupedExperts
from hyperep.platform.capabilities import Capability

PORT = "styles"
_BASE = (
    *(Capability.AUTODIFF, Capability.MODULES, Capability.SHARDED_PARAMETERS, Capability.GROUPED_MATMUL),
    Capability.PERMUTE_ROWS,
)
EP = (*_BASE, Capability.ALL_TO_ALL)
TP = (*_BASE, Capability.ALL_REDUCE)
LEVELS = (*EP, Capability.SUBGROUPS)
ETP = (*EP, Capability.ALL_REDUCE, Capability.SUBGROUPS)
_NAMES = ("w1", "w2", "w3")
_DIM, _HIDDEN, _LOCAL = 5, 8, 4
_TOLERANCE = 1e-4
"""Relative; see :mod:`hyperep.conformance.requirements.styles`."""


class Problem:
    """Experts with weights of size O(1), and tokens, choices, weights and cotangents of every data rank."""

    def __init__(self, case: Case, choices: str, data_ranks: int) -> None:
        self.case, self.experts = case, _LOCAL * data_ranks
        make, _ = CHOICES[choices]
        self.indices = make(case.rng(77), data_ranks, self.experts)
        case.note(choices=choices, indices=[i.tolist() for i in self.indices])
        hidden = case.divisible(_HIDDEN)
        shapes = ((self.experts, hidden, _DIM), (self.experts, _DIM, hidden), (self.experts, hidden, _DIM))
        self.weights = [case.normal(shape, 10 + n) / 2 for n, shape in enumerate(shapes)]
        counts = [len(i) for i in self.indices]
        self.tokens = [case.normal((n, _DIM), 20, r) for r, n in enumerate(counts)]
        self.scores = [case.normal((n, TOP_K), 30, r) for r, n in enumerate(counts)]
        self.cotangents = [case.normal((n, _DIM), 40, r) for r, n in enumerate(counts)]

    def sharded(self, style: Any, mesh: Any) -> Any:
        """The native experts, sharded by *style*."""
        module = GroupedExperts(self.case.platform, _DIM, self.case.divisible(_HIDDEN), self.experts)
        self.case.assign(module, dict(zip(_NAMES, self.weights, strict=True)))
        return style.apply(module, mesh)

    def run(self, module: Any, data_rank: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Output, and gradients of tokens, scores, and this rank's parts of the experts' weights."""
        handles = self.case.platform.parameters(module)
        numbers = self.case.tensor(self.indices[data_rank])
        return self.case.gradients(
            lambda x, s: module(x, numbers, s),
            [self.tokens[data_rank], self.scores[data_rank]],
            self.cotangents[data_rank],
            [handles[name] for name in _NAMES],
        )

    def agree(self, module: Any, data_rank: int) -> None:
        """Demand the reference's output and all gradients."""
        case, platform = self.case, self.case.platform
        every = zip(self.tokens, self.indices, self.scores, self.cotangents, strict=True)
        wanted = [oracle.routed(x, i, s, self.weights, g) for x, i, s, g in every]
        out, (grad_x, grad_s, *grads) = self.run(module, data_rank)
        case.close(out, wanted[data_rank][0], "output", _TOLERANCE)
        case.close(grad_x, wanted[data_rank][1], "gradient of the tokens", _TOLERANCE)
        case.close(grad_s, wanted[data_rank][2], "gradient of the weights of choices", _TOLERANCE)
        handles = platform.parameters(module)
        for n, (name, gradient) in enumerate(zip(_NAMES, grads, strict=True)):
            total = np.sum([of_rank[3][n] for of_rank in wanted], axis=0)
            part = platform.sharding(handles[name]).local_slices(total.shape)
            case.close(gradient, total[part], f"gradient of this rank's part of {name}", _TOLERANCE)


def ep_mesh(case: Case) -> Any:
    return case.mesh((case.ranks,), ("ep",))


def shapes(ranks: int) -> list[tuple[int, int]]:
    """Shapes of meshes with two dimensions of so many ranks."""
    return [(n, ranks // n) for n in range(1, ranks + 1) if ranks % n == 0]


@requirement(
    "EP-tokens",
    "Experts that are called with tokens equal the unsharded ones under ExpertParallel, in output and the gradients of "
    "tokens, of weights and of all experts, whatever the choices.",
    port=PORT,
    capabilities=EP,
    needs=("EP-random", *(f"TOKENS-{choices}" for choices in CHOICES), "XP-argsort"),
)
def tokens(case: Case) -> None:
    mesh = ep_mesh(case)
    for choices in CHOICES:
        problem = Problem(case, choices, case.ranks)
        problem.agree(problem.sharded(hyperep.ExpertParallel(), mesh), case.rank)


@requirement(
    "EP-tokens-as-rows",
    "With exchange='rows' they equal them too: each token travels once for each of its experts.",
    port=PORT,
    capabilities=EP,
    needs=("EP-tokens",),
)
def tokens_as_rows(case: Case) -> None:
    mesh = ep_mesh(case)
    for choices in ("random", "duplicates", "nobody", "empty-rank", "all-empty"):
        problem = Problem(case, choices, case.ranks)
        problem.agree(problem.sharded(hyperep.ExpertParallel(exchange="rows"), mesh), case.rank)


@requirement(
    "EP-tokens-deterministic",
    "Two runs on the same tokens give the same bits, in output and all gradients.",
    port=PORT,
    capabilities=EP,
    needs=("EP-tokens", "TOKENS-deterministic"),
)
def tokens_deterministic(case: Case) -> None:
    problem = Problem(case, "random", case.ranks)
    module = problem.sharded(hyperep.ExpertParallel(), ep_mesh(case))
    runs = [problem.run(module, case.rank) for _ in range(3)]
    for out, gradients in runs[1:]:
        for got, want in zip((out, *gradients), (runs[0][0], *runs[0][1]), strict=True):
            case.equal(got, want, "another run against the first one")


@requirement(
    "EP-levels",
    "ExpertParallel in two levels, levels=('node', 'ep'), equals the unsharded experts and one level in output and all "
    "gradients; a rank owns the experts that are its in the order of the flattened mesh.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=LEVELS,
    needs=("EP-tokens", "TOKENS-levels"),
    min_ranks=4,
)
def two_levels(case: Case) -> None:
    one = ep_mesh(case)
    for shape in shapes(case.ranks):
        case.note(mesh=shape)
        mesh = case.mesh(shape, ("node", "ep"))
        for choices in ("duplicates", "nobody", "empty-rank", "all-empty") if min(shape) > 1 else ("nobody",):
            problem = Problem(case, choices, case.ranks)
            module = problem.sharded(hyperep.ExpertParallel(levels=("node", "ep")), mesh)
            problem.agree(module, case.rank)
            out, gradients = problem.run(module, case.rank)
            in_one = problem.run(problem.sharded(hyperep.ExpertParallel(), one), case.rank)
            for got, want in zip((out, *gradients), (in_one[0], *in_one[1]), strict=True):
                case.close(got, want, "two levels against one")


@requirement(
    "TP-tokens",
    "Experts that are called with tokens equal the unsharded ones under TensorParallel, in output and all gradients, "
    "for tokens and weights that are the same on all ranks.",
    port=PORT,
    capabilities=TP,
    needs=("TP-parity", "SUM-rows-no-row", "XP-argsort"),
)
def tp_tokens(case: Case) -> None:
    mesh = case.mesh((case.ranks,), ("tp",))
    for choices in ("random", "duplicates", "nobody", "all-empty"):
        problem = Problem(case, choices, 1)
        problem.agree(problem.sharded(hyperep.TensorParallel(), mesh), 0)


@requirement(
    "ETP-tokens",
    "Experts that are called with tokens equal the unsharded ones under ExpertTensorParallel in output and all "
    "gradients, on every shape of mesh, for tokens that are the same over tp.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=ETP,
    needs=("ETP-random", "EP-tokens", "TP-tokens"),
)
def etp_tokens(case: Case) -> None:
    for shape in shapes(case.ranks):
        mesh = case.mesh(shape, ("ep", "tp"))
        for choices in ("duplicates", "nobody", "empty-rank", "all-empty"):
            problem = Problem(case, choices, shape[0])
            case.note(mesh=shape)
            problem.agree(problem.sharded(hyperep.ExpertTensorParallel(), mesh), mesh.get_local_rank("ep"))
