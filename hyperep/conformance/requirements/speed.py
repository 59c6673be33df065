# SPDX-License-Identifier: Apache-2.0
"""Speed beside the platform's own primitives. No part of the verdict; it shows an author which default is slow here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hyperep.conformance.case import Case
from hyperep.conformance.requirement import Level, requirement
from hyperep.conformance.speed import compare_speed
from hyperep.platform.capabilities import Capability

PORT = "speed"
_ROWS, _WIDTH = 4096, 128
_GROUPS = 32


@requirement(
    "SPEED-exchange",
    "The exchange of rows by uneven splits, forward and backward, beside gathering as many bytes twice.",
    port=PORT,
    level=Level.SPEED,
    capabilities=(Capability.ALL_TO_ALL, Capability.ALL_GATHER, Capability.AUTODIFF),
    needs=("A2A-grad", "AG-values"),
    min_ranks=2,
)
def exchange(case: Case) -> None:
    platform, share = case.platform, _ROWS // case.ranks
    # To the rank r from the rank s: more or fewer than an even share, by the distance of the two.
    sent = [share + (r - case.rank) % case.ranks for r in range(case.ranks)]
    received = [share + (case.rank - s) % case.ranks for s in range(case.ranks)]
    x = case.tensor(case.normal((sum(sent), _WIDTH), case.rank))
    part = case.tensor(case.normal((share, _WIDTH), case.rank))

    def there_and_back() -> Sequence[Any]:
        def send(x: Any) -> Any:
            return platform.differentiable_all_to_all_single(x, sent, received)

        out, pullback = platform.vjp(send, x)
        return pullback(out)

    compare_speed(
        case,
        there_and_back,
        lambda: (platform.all_gather(part), platform.all_gather(part)),
        "two all_gathers that bring a rank as many rows",
        ("differentiable_all_to_all_single",),
    )


@requirement(
    "SPEED-rows",
    "Permuting rows and adding up two for each result, forward and backward, beside elementwise passes over them.",
    port=PORT,
    level=Level.SPEED,
    capabilities=(Capability.PERMUTE_ROWS, Capability.AUTODIFF),
    needs=("PERM-grad", "SUM-rows"),
)
def rows(case: Case) -> None:
    platform, order = case.platform, case.rng().permutation(_ROWS)
    inverse = np.argsort(order)
    x = case.tensor(case.normal((_ROWS, _WIDTH)))
    g = case.tensor(case.normal((_ROWS // 2, _WIDTH)))
    index, back = case.tensor(order), case.tensor(inverse)
    pairs, of_pairs = case.tensor(inverse.reshape(-1, 2)), case.tensor(order)

    def moved_and_added() -> Sequence[Any]:
        def function(x: Any) -> Any:
            return platform.sum_rows(platform.permute_rows(x, index, back), pairs, of_pairs)

        return platform.vjp(function, x)[1](g)

    compare_speed(
        case,
        moved_and_added,
        lambda: (x * 2.0, x * 3.0, x * 4.0, x * 5.0),
        "four elementwise passes over the rows",
        ("permute_rows", "sum_rows"),
    )


@requirement(
    "SPEED-products",
    "The product of each group with its own matrix, forward and backward, beside dense products of the same size.",
    port=PORT,
    level=Level.SPEED,
    capabilities=(Capability.GROUPED_MATMUL, Capability.AUTODIFF),
    needs=("GMM-grad",),
)
def products(case: Case) -> None:
    platform, xp = case.platform, case.xp
    x = case.tensor(case.normal((_ROWS // 2, _WIDTH)))
    weight = case.tensor(case.normal((_GROUPS, _WIDTH, _WIDTH), 1))
    g = case.tensor(case.normal((_ROWS // 2, _WIDTH), 2))
    dense = case.tensor(case.normal((_WIDTH, _WIDTH), 3))
    sizes = case.tensor(np.full(_GROUPS, _ROWS // 2 // _GROUPS))

    def grouped() -> Sequence[Any]:
        return platform.vjp(lambda x, w: platform.grouped_matmul(x, w, sizes), x, weight)[1](g)

    compare_speed(
        case,
        grouped,
        lambda: (xp.matmul(x, dense), xp.matmul(g, dense), xp.matmul(xp.permute_dims(g, (1, 0)), x)),
        "three dense products of the same size",
        ("grouped_matmul",),
    )
