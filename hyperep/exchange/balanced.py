# SPDX-License-Identifier: Apache-2.0
"""Experts over ranks, of which hot ones are computed in several places: the exchange of tokens with copies.

A step is the exchange of tokens of :mod:`hyperep.exchange.tokens`, to experts that are numbered anew::

      1. count choices by expert, and tell all ranks           1 small collective, 1 host copy
      2. plan, the same on every rank: which copies there are, and whose choices go to them
      3. number each choice by the place where it is computed; a rank has its own experts and copies
      4. dispatch; with it go the weights of experts that are copied
      5. experts, own and copied; combine

Where nothing is copied, steps 3 to 5 are those of the layer without balance. In backward the gradients of copies go
home after those of the tokens, in one node of autodiff, so that the order of exchanges is the same on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hyperep.exchange import token_input
from hyperep.exchange.balance import Balance, Placement
from hyperep.exchange.copies import own_choices
from hyperep.exchange.counting import count_sorted
from hyperep.exchange.lending import plan_lending
from hyperep.exchange.orders import argsort_below, inverse_order
from hyperep.exchange.routed import RoutedExperts, over_ranks
from hyperep.exchange.tokens import combine_tokens, dispatch_lending, plan_dispatch
from hyperep.mesh import DeviceMesh
from hyperep.platform.protocol import Module

__all__ = ["OverRanksBalanced"]

Borrowed = Callable[[Mapping[str, Any], int], RoutedExperts]
"""From copied weights by path, and how many experts these are, to routed experts."""


@dataclass(frozen=True)
class OverRanksBalanced:
    """What :func:`hyperep.exchange.routed.over_ranks` makes, with hot experts computed in several places.

    Results are the same to rounding.
    """

    experts: RoutedExperts
    """Of this rank."""
    borrowed: Borrowed
    """Makes routed experts of copies."""
    mesh: DeviceMesh
    """1-D."""
    num_experts: int
    """Of all ranks."""
    balance: Balance
    module: Module
    """Whose parameters the experts are; the first dim of each is the expert."""

    def __call__(self, tokens: Any, indices: Any, weights: Any, *, rows: int | None = None) -> Any:
        """What the experts make of the tokens."""
        platform, group, rank = self.mesh.platform, self.mesh.get_group(), self.mesh.get_local_rank()
        placement, order = self._placed(tokens, indices, weights)
        if placement is None or not placement.copies:
            return over_ranks(self.experts, self.mesh, self.num_experts)(tokens, indices, weights, rows=rows)
        handles = platform.parameters(self.module)
        places = _numbered(platform, indices, order, placement, rank)
        (context,) = plan_dispatch(tokens, places, weights, self.mesh, num_experts=placement.ranks * placement.width)
        lending = plan_lending(platform, group, placement, rank)
        lent = [platform.local(handle) for handle in handles.values()]
        tokens, numbers, weights, copies = dispatch_lending(tokens, places, weights, context, lending, lent)

        # Own experts first; copies, where there are any, are experts of their own.
        owned, (own_rows, copied_rows) = placement.owned, placement.rows_of(rank)
        out = self.experts(tokens, own_choices(platform, numbers, 0, owned), weights, rows=own_rows)
        slots = len(placement.slots(rank))
        if slots:
            experts = self.borrowed(dict(zip(handles, copies, strict=True)), slots)
            out = out + experts(tokens, own_choices(platform, numbers, owned, slots), weights, rows=copied_rows)
        return combine_tokens(out, context)

    def _placed(self, tokens: Any, indices: Any, weights: Any) -> tuple[Placement | None, Any]:
        """The plan, and the order of choices by expert; nothing to plan on one rank. Errors are those of a dispatch."""
        if self.mesh.size() == 1:
            return None, None
        platform, xp, experts = self.mesh.platform, self.mesh.platform.xp, self.num_experts
        given = token_input.inspect(platform, tokens, indices, weights, experts, 1)
        counts = order = None
        if given.by_rank is not None:
            flat = xp.reshape(indices, (math.prod(indices.shape),))
            order = argsort_below(xp, flat, experts + 1)
            counts = xp.reshape(count_sorted(platform, xp.take(flat, order, axis=0), experts), (1, experts))
        told = platform.all_gather(given.told(platform, 1, experts, counts), self.mesh.get_group())  # [R, E + header]
        (host,) = platform.to_host(told)  # host sync here, beside that of the dispatch
        token_input.CHECK.raise_any(self.mesh, host, given.said)
        numbers = sum(math.prod(platform.local(p).shape) for p in platform.parameters(self.module).values())
        worth = self.balance.worth(numbers * self.mesh.size() // experts, tokens.shape[1])
        return self.balance.plan(host[:, :experts], worth), order


def _numbered(platform: Any, indices: Any, order: Any, placement: Placement, rank: int) -> Any:
    """The place of each choice: integers ``[T, K]`` to int64 ``[T, K]``, ``R * width`` for nobody."""
    xp, count = platform.xp, math.prod(indices.shape)
    places = placement.places(rank)  # by expert, and so without nobody, who is last
    nobody = xp.full((count - len(places),), placement.ranks * placement.width, dtype=xp.int64)
    sorted_places = xp.concat([platform.from_host(places), nobody], axis=0)
    return xp.reshape(xp.take(sorted_places, inverse_order(xp, order), axis=0), indices.shape)
