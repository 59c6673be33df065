# SPDX-License-Identifier: Apache-2.0
"""Routed experts, and what makes others of them: parallelism as functions from routed experts to routed experts.

*Routed experts* are called as ``experts(tokens [T, D], indices [T, K], weights [T, K]) -> [T, D]``: each token's
experts are computed, weighted and added up. Index ``E``, the number of experts, means nobody. In here they also take
``rows``, how many choices are not nobody, where the caller knows: a copy to the host less.

*Row experts* are called as ``experts(rows [N, D], tokens_per_expert [E]) -> [N, D]``, with rows sorted by expert.

========================== ===========================================================================
``routed_from_rows``       routed experts, of row experts: expand, compute, weight and sum
``rows_from_routed``       row experts, of routed experts: each row is a token with one choice
``over_ranks``             the experts of all ranks, of those of one: tokens travel
``in_slices``              whole experts, of one slice of each: sums are added up over a group
========================== ===========================================================================

They compose: ``over_ranks(over_ranks(experts, inner), outer)`` is an exchange in two levels, in which a token crosses
to another node once, whichever of its ranks own its experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hyperep.exchange.expansion import expand_tokens, merge_rows, plan_routes
from hyperep.exchange.tokens import combine_tokens, dispatch_tokens
from hyperep.mesh import DeviceMesh
from hyperep.platform.protocol import Group, Module, Platform

__all__ = [
    "RoutedExperts",
    "RowExperts",
    "added_to",
    "in_slices",
    "over_ranks",
    "routed_from_rows",
    "rows_from_routed",
]

RoutedExperts = Callable[..., Any]
"""``experts(tokens, indices, weights, *, rows=None) -> tokens``."""
RowExperts = Callable[[Any, Any], Any]
"""``experts(rows, tokens_per_expert) -> rows``."""


def routed_from_rows(platform: Platform[Any], experts: RowExperts, num_experts: int) -> RoutedExperts:
    """Routed experts that sort their choices by expert and hand them to row *experts*; there are *num_experts*."""

    def routed(tokens: Any, indices: Any, weights: Any, *, rows: int | None = None) -> Any:
        plan = plan_routes(platform, indices, num_experts, rows)
        done = experts(expand_tokens(platform, tokens, plan), plan.tokens_per_expert)
        return merge_rows(platform, done, weights, plan)

    return routed


def rows_from_routed(platform: Platform[Any], experts: RoutedExperts) -> RowExperts:
    """Row experts that hand each row to routed *experts* as a token with one choice, of weight one."""
    xp = platform.xp

    def by_row(rows: Any, tokens_per_expert: Any) -> Any:
        count = rows.shape[0]
        stops = xp.cumulative_sum(tokens_per_expert)
        numbers = xp.searchsorted(stops, platform.arange(1, count + 1, dtype=stops.dtype))
        one_each = xp.ones((count, 1), dtype=rows.dtype)
        return experts(rows, xp.reshape(xp.astype(numbers, xp.int64), (count, 1)), one_each, rows=count)

    return by_row


def added_to(out: Any, meanwhile: Module | None, x: Any) -> Any:
    """*out*, and what the module *meanwhile* makes of *x*, if there is one."""
    return out if meanwhile is None else out + meanwhile(x)


def over_ranks(experts: RoutedExperts, mesh: DeviceMesh, num_experts: int) -> RoutedExperts:
    """The *num_experts* routed experts of a 1-D *mesh*, of those that this rank owns: tokens travel to them."""

    def routed(tokens: Any, indices: Any, weights: Any, *, rows: int | None = None) -> Any:
        *arrived, context = dispatch_tokens(tokens, indices, weights, mesh, num_experts=num_experts)
        return combine_tokens(experts(*arrived, rows=context.rows), context)

    return routed


def in_slices(experts: RoutedExperts, platform: Platform[Any], group: Group, *, reduce: bool = True) -> RoutedExperts:
    """Whole routed experts, of a slice of each on every rank of *group*; tokens and weights are the same on all ranks.

    What slices return is added up once for each token, after all of its experts: the pair of reductions of Megatron-LM
    (arXiv:1909.08053), with the weights' gradients, which are partial too. Without *reduce* the caller adds up.
    """

    def routed(tokens: Any, indices: Any, weights: Any, *, rows: int | None = None) -> Any:
        tokens, weights = platform.copy_to_group(tokens, group), platform.copy_to_group(weights, group)
        partial = experts(tokens, indices, weights, rows=rows)
        return platform.reduce_from_group(partial, group) if reduce else partial

    return routed
