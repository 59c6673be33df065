# SPDX-License-Identifier: Apache-2.0
"""The exchange of tokens: each goes once to each rank that owns one of its experts, and one sum comes back from there.

A token with ``K`` choices is not ``K`` rows on the wire. It travels with the numbers and weights of its choices, and
the rank that gets it computes all those of its own experts and adds them up::

    dispatch                                                        collectives        host copies
      1. count copies of tokens, and choices, for each rank
      2. exchange the counts                                        1 small
      3. copy them to the host                                                         1
      4. exchange copies of tokens; numbers and weights of choices  1 large, 1 narrow
      5. renumber: this rank's experts from 0, all others nobody
    experts: tokens [P, D], numbers [P, K], weights [P, K] -> sums [P, D]
    combine
      6. exchange sums back                                         1 large
      7. add up each token's sums, in float32, rank by rank

Backward issues the exchanges of 6 and 4 in reverse, the weights' gradients with the tokens', and copies nothing to the
host. The gradient of a weight comes from the rank that owns its expert, and that of a token is the sum over its copies.

Sending a token once for several experts of one rank is what DeepEP (https://github.com/deepseek-ai/DeepEP) does on
CUDA; adding up before the way back is its idea too, and HybridEP's. Here both are all-to-alls of any framework.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hyperep.exchange import token_input
from hyperep.exchange.copies import Copies, own_choices, plan_copies
from hyperep.exchange.lending import Lending
from hyperep.exchange.schedule import bounds, joined
from hyperep.mesh import DeviceMesh
from hyperep.platform.dtypes import dtype_named
from hyperep.platform.protocol import Group, Platform

__all__ = [
    "TokenDispatchContext",
    "add_up",
    "combine_tokens",
    "dispatch_lending",
    "dispatch_planned",
    "dispatch_tokens",
    "from_owners",
    "join_choices",
    "plan_dispatch",
    "split_choices",
    "to_owners",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenDispatchContext:
    """What one dispatch of tokens leaves for its combine."""

    platform: Platform[Any] = field(repr=False)
    group: Group = field(repr=False)
    input_splits: tuple[int, ...]
    """Copies of tokens that this rank sent to each rank of the group."""
    output_splits: tuple[int, ...]
    """Copies that it received from each."""
    rows: int
    """How many choices of the received tokens are this rank's own experts."""
    first: int
    """Number of this rank's first expert."""
    owned: int
    """How many it owns."""
    part: slice
    """Which of the rank's tokens."""
    copies: Copies | None = field(repr=False)
    """Which copies were sent; ``None`` on a mesh of one rank, where tokens stay as they are."""


def dispatch_tokens(
    tokens: Any, indices: Any, weights: Any, mesh: DeviceMesh, *, num_experts: int
) -> tuple[Any, Any, Any, TokenDispatchContext]:
    """Send each token once to each rank that owns one of its experts.

    Collective over the mesh. Differentiable in *tokens* and *weights*.

    Args:
        tokens: ``[T, D]``.
        indices: int32 or int64 ``[T, K]``: the experts of each token, ``0 .. E - 1``, also the same one twice; ``E``
            means nobody. A token that goes to nobody does not travel.
        weights: ``[T, K]``, of a floating dtype: the weight of each choice.
        mesh: 1-D mesh of ``R`` ranks; rank ``r`` owns experts ``r * E / R`` and following.
        num_experts: ``E``, the same on all ranks and divisible by ``R``.

    Returns:
        The ``P`` tokens that reached this rank, ``[P, D]``, by source rank and within one in its order; int64 numbers
        ``[P, K]`` of their choices, in which this rank's experts are ``0 .. E / R - 1`` and ``E / R`` is nobody;
        weights ``[P, K]``; and the context that :func:`combine_tokens` takes.

    Raises:
        ValueError: on all ranks of the mesh, naming the rank at fault: shapes do not fit together, an index is out of
            range, or a token is not of the size, dtype and number of choices that it has on the other ranks.
        TypeError: on all ranks, if one got tensors of another platform, or of dtypes that are not as above.
    """
    (context,) = plan_dispatch(tokens, indices, weights, mesh, num_experts=num_experts)
    return *dispatch_planned(tokens, indices, weights, context), context


def dispatch_planned(tokens: Any, indices: Any, weights: Any, context: TokenDispatchContext) -> tuple[Any, Any, Any]:
    """Steps 4 and 5; see :func:`dispatch_tokens`."""
    if context.copies is None:
        return tokens, indices, weights
    # 4. Exchange tokens, numbers and weights.
    tokens, weights, numbers = _send(context, tokens, indices, weights)
    # 5. Renumber.
    return tokens, own_choices(context.platform, numbers, context.first, context.owned), weights


def plan_dispatch(
    tokens: Any,
    indices: Any,
    weights: Any,
    mesh: DeviceMesh,
    *,
    num_experts: int,
    parts: int = 1,
    choose: Callable[[int], int] | None = None,
) -> list[TokenDispatchContext]:
    """Steps 1 to 3 for each of *parts* runs of tokens (:func:`hyperep.exchange.schedule.bounds`), all in one message.

    Arguments and errors are those of :func:`dispatch_tokens`; *parts* is the same on all ranks. With *choose* they are
    joined to fewer, of which it says how many: a divisor of *parts*, from the tokens of the rank that has the most.
    """
    platform, group, ranks = mesh.platform, mesh.get_group(), mesh.size()
    owned = num_experts // ranks

    # 1. Count, and tell what the tokens are like, so that bad input on one rank is an error on every rank.
    given = token_input.inspect(platform, tokens, indices, weights, num_experts, ranks)
    cuts = bounds(0 if given.by_rank is None else tokens.shape[0], parts)
    message = given.message(platform, ranks, cuts)  # [R, 2 C + header]
    # 2. Exchange the counts.
    received = platform.all_to_all_single(message, group=group)  # [R, 2 C + header]
    # 3. Host sync here, the only one: everything below is computed from this copy.
    sent_host, received_host = platform.to_host(message, received)
    token_input.CHECK.raise_any(mesh, received_host, given.said)
    sent, arriving = (token_input.Counts.of(message, parts) for message in (sent_host, received_host))
    if choose is not None:
        parts = choose(token_input.most_tokens(received_host))
        cuts, sent, arriving = joined(cuts, parts), sent.joined(parts), arriving.joined(parts)
    return [
        TokenDispatchContext(
            platform=platform,
            group=group,
            input_splits=splits,
            output_splits=arriving.copies[part],
            rows=arriving.choices[part],
            first=mesh.get_local_rank() * owned,
            owned=owned,
            part=slice(*cut),
            copies=None if ranks == 1 else plan_copies(platform, given.by_rank[:, slice(*cut)], splits),
        )
        for part, (cut, splits) in enumerate(zip(cuts, sent.copies, strict=True))
    ]


def combine_tokens(sums: Any, context: TokenDispatchContext) -> Any:
    """Bring the sums of the copies back, and add up those of each token.

    Collective over the mesh of the dispatch; no host copy. Differentiable in *sums*.

    Args:
        sums: what the experts made of the dispatched tokens, ``[P, D']``, in their order.
        context: from the dispatch.

    Returns:
        ``[T, D']``; zeros for a token that went to nobody.

    Raises:
        ValueError: the number of sums is not that of the tokens that were dispatched. On this rank only, since telling
            the others would cost a collective.
    """
    if context.copies is None:
        return sums
    require_one_each(sums, context)

    def forward(sums: Any) -> tuple[Any, tuple[Any, ...]]:
        # 6. and 7.
        return add_up(from_owners(sums, context), context), ()

    def backward(residuals: Any, cotangents: Any, needed: Any) -> tuple[Any, ...]:
        return (to_owners(cotangents[0], context),)

    return context.platform.custom_vjp(forward, backward)(sums)


def dispatch_lending(
    tokens: Any, indices: Any, weights: Any, context: TokenDispatchContext, lending: Lending, lent: Sequence[Any]
) -> tuple[Any, Any, Any, list[Any]]:
    """Steps 4 and 5, and with the tokens this rank's parts of parameters, *lent* to those who have copies of experts.

    Returns what :func:`dispatch_planned` does, and the parts of the copies that this rank has. In backward their
    gradients follow those of the tokens.
    """
    tokens, weights, numbers, copies = _exchanged(context, tokens, indices, weights, lending, lent)
    return tokens, own_choices(context.platform, numbers, context.first, context.owned), weights, copies


def _send(context: TokenDispatchContext, tokens: Any, indices: Any, weights: Any) -> tuple[Any, Any, Any]:
    """Copies of tokens and of their weights, differentiable, and of the numbers of their experts."""
    tokens, weights, numbers, _ = _exchanged(context, tokens, indices, weights)
    return tokens, weights, numbers


def _exchanged(
    context: TokenDispatchContext,
    tokens: Any,
    indices: Any,
    weights: Any,
    lending: Lending | None = None,
    lent: Sequence[Any] = (),
) -> tuple[Any, Any, Any, list[Any]]:
    platform, xp = context.platform, context.platform.xp
    choices = join_choices(platform, indices, weights)
    wire = choices.dtype
    # The weights arrive beside the numbers, outside of autodiff.
    numbers, weights_there = split_choices(platform, to_owners(choices, context), weights.dtype)

    def forward(tokens: Any, weights: Any, *lent: Any) -> tuple[Any, tuple[Any, ...]]:
        copies = [] if lending is None else [lending.lend(x) for x in lent]
        return (to_owners(tokens, context), weights_there + 0, *copies), ()

    def backward(residuals: Any, cotangents: Any, needed: Any) -> tuple[Any, ...]:
        # Both, also where only one is needed here: another rank may need the other, and waits for this one.
        tokens, weights = (from_owners(g, context) for g in (cotangents[0], xp.astype(cotangents[1], wire)))
        # What is frozen is so on all ranks.
        home = [
            lending.bring_home(g) if wanted and lending is not None else None
            for g, wanted in zip(cotangents[2:], needed[2:], strict=True)
        ]
        return add_up(tokens, context), xp.astype(add_up(weights, context), weights_there.dtype), *home

    tokens, weights, *copies = platform.custom_vjp(forward, backward)(tokens, weights, *lent)
    return tokens, weights, numbers, copies


def require_one_each(sums: Any, context: TokenDispatchContext) -> None:
    """Whether there is one sum for each token that was dispatched; errors as for :func:`combine_tokens`."""
    expected = sum(context.output_splits)
    if sums.shape[0] != expected:
        raise ValueError(
            f"combine got the sums of {sums.shape[0]} tokens, but the dispatch delivered {expected}; experts must "
            "return one row for each token, in the same order"
        )


# Two linear maps make the whole way, there and back and in backward: the one is what the other is transposed.
def to_owners(x: Any, context: TokenDispatchContext, async_op: bool = False) -> Any:
    """Copies of what belongs to each token, to the ranks that own its experts: ``[T, ...] -> [P, ...]``; not recorded.

    With *async_op* a :class:`~hyperep.platform.protocol.Work` that will return them.
    """
    assert context.copies is not None, "a mesh of one rank sends nothing"
    x = context.platform.xp.take(x, context.copies.token, axis=0)
    return context.platform.all_to_all_single(x, context.output_splits, context.input_splits, context.group, async_op)


def from_owners(x: Any, context: TokenDispatchContext, async_op: bool = False) -> Any:
    """What belongs to each copy, back to the rank of its token; :func:`add_up` makes ``[T, ...]`` of it. Not recorded.

    With *async_op* a :class:`~hyperep.platform.protocol.Work` that will return it.
    """
    return context.platform.all_to_all_single(x, context.input_splits, context.output_splits, context.group, async_op)


def add_up(back: Any, context: TokenDispatchContext) -> Any:
    """Sum over the copies of each token, in float32 at least, rank by rank; not recorded."""
    assert context.copies is not None, "a mesh of one rank sends nothing"
    return context.platform.sum_rows(back, context.copies.index, context.copies.entry)


def join_choices(platform: Platform[Any], indices: Any, weights: Any) -> Any:
    """Weights and numbers of choices as they travel, side by side: ``[T, 2 K]``; not recorded.

    Numbers of experts are far below 2**24, to which float32 is exact. Narrower weights are widened on the wire, which
    changes none of their values.
    """
    xp = platform.xp
    wire = weights.dtype if dtype_named(xp, weights.dtype, ("float64",)) else xp.float32
    return xp.concat([xp.astype(x, wire) for x in (platform.stop_gradient(weights), indices)], axis=1)


def split_choices(platform: Platform[Any], choices: Any, dtype: Any) -> tuple[Any, Any]:
    """The other way: int64 numbers ``[P, K]``, and weights ``[P, K]`` in *dtype*."""
    xp, top_k = platform.xp, choices.shape[1] // 2
    return xp.astype(choices[:, top_k:], xp.int64), xp.astype(choices[:, :top_k], dtype)
