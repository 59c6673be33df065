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

from dataclasses import dataclass, field
from typing import Any

from hyperep.exchange import token_input
from hyperep.exchange.copies import Copies, own_choices, plan_copies
from hyperep.mesh import DeviceMesh
from hyperep.platform.protocol import Group, Platform

__all__ = ["TokenDispatchContext", "combine_tokens", "dispatch_tokens"]


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
    platform, group, ranks = mesh.platform, mesh.get_group(), mesh.size()
    local = num_experts // ranks

    # 1. Count, and tell what the tokens are like, so that bad input on one rank is an error on every rank.
    given = token_input.inspect(platform, tokens, indices, weights, num_experts, ranks)
    message = given.message(platform, ranks)  # [R, header]
    # 2. Exchange the counts.
    received = platform.all_to_all_single(message, group=group)  # [R, header]
    # 3. Host sync here, the only one: everything below is computed from this copy.
    sent_host, received_host = platform.to_host(message, received)
    token_input.CHECK.raise_any(mesh, received_host, given.said)
    input_splits, _ = token_input.copies_and_choices(sent_host)
    output_splits, rows = token_input.copies_and_choices(received_host)
    if ranks == 1:
        here = TokenDispatchContext(
            platform=platform, group=group, input_splits=(), output_splits=(), rows=rows, copies=None
        )
        return tokens, indices, weights, here
    context = TokenDispatchContext(
        platform=platform,
        group=group,
        input_splits=input_splits,
        output_splits=output_splits,
        rows=rows,
        copies=plan_copies(platform, given.by_rank, input_splits),
    )
    # 4. Exchange tokens, numbers and weights.
    tokens, weights, numbers = _send(context, tokens, indices, weights)
    # 5. Renumber.
    return tokens, own_choices(platform, numbers, mesh.get_local_rank() * local, local), weights, context


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
    platform, group, copies = context.platform, context.group, context.copies
    if copies is None:
        return sums
    expected = sum(context.output_splits)
    if sums.shape[0] != expected:
        raise ValueError(
            f"combine got the sums of {sums.shape[0]} tokens, but the dispatch delivered {expected}; experts must "
            "return one row for each token, in the same order"
        )

    def forward(sums: Any) -> tuple[Any, tuple[Any, ...]]:
        # 6. and 7.
        back = platform.all_to_all_single(sums, context.input_splits, context.output_splits, group)
        return platform.sum_rows(back, copies.index, copies.entry), ()

    def backward(residuals: Any, cotangents: Any, needed: Any) -> tuple[Any, ...]:
        g = platform.xp.take(cotangents[0], copies.token, axis=0)
        return (platform.all_to_all_single(g, context.output_splits, context.input_splits, group),)

    return platform.custom_vjp(forward, backward)(sums)


def _send(context: TokenDispatchContext, tokens: Any, indices: Any, weights: Any) -> tuple[Any, Any, Any]:
    """Copies of tokens and of their weights, differentiable, and of the numbers of their experts."""
    platform, copies = context.platform, context.copies
    assert copies is not None
    xp, top_k = platform.xp, indices.shape[1]
    # Numbers of experts travel beside the weights, in the same message: they are far below 2**24, to which float32 is
    # exact. Narrower weights are widened on the wire, which changes none of their values.
    wire = weights.dtype if weights.dtype == getattr(xp, "float64", None) else xp.float32

    def there(x: Any) -> Any:
        x = xp.take(x, copies.token, axis=0)
        return platform.all_to_all_single(x, context.output_splits, context.input_splits, context.group)

    def back(g: Any) -> Any:
        g = platform.all_to_all_single(g, context.input_splits, context.output_splits, context.group)
        return platform.sum_rows(g, copies.index, copies.entry)

    choices = [xp.astype(x, wire) for x in (platform.stop_gradient(weights), indices)]
    choices_there = there(xp.concat(choices, axis=1))  # [P, 2 K], not recorded
    weights_there = xp.astype(choices_there[:, :top_k], weights.dtype)

    def forward(tokens: Any, weights: Any) -> tuple[Any, tuple[Any, ...]]:
        return (there(tokens), weights_there + 0), ()

    def backward(residuals: Any, cotangents: Any, needed: Any) -> tuple[Any, ...]:
        # Both, also where only one is needed here: another rank may need the other, and waits for this one.
        return back(cotangents[0]), xp.astype(back(xp.astype(cotangents[1], wire)), weights.dtype)

    tokens, weights = platform.custom_vjp(forward, backward)(tokens, weights)
    return tokens, weights, xp.astype(choices_there[:, top_k:], xp.int64)
