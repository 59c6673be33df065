# SPDX-License-Identifier: Apache-2.0
"""The exchange of tokens on the platform: layout, values, both gradients, cost, and errors that every rank hears of.

Expert ``e`` multiplies by ``e + 1``, and data are small integers: everything is exact, in any order of additions.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hyperep.conformance.case import Case
from hyperep.conformance.choices import CHOICES, TOP_K, copies
from hyperep.conformance.memory import freed
from hyperep.conformance.requirement import Level, Requirement, requirement
from hyperep.conformance.wire import sent, watching
from hyperep.exchange.routed import RoutedExperts, over_ranks, routed_from_rows
from hyperep.exchange.tokens import combine_tokens, dispatch_tokens
from hyperep.platform.capabilities import Capability

PORT = "exchange of tokens"
_SEND = (Capability.ALL_TO_ALL,)
_BOTH_WAYS = (Capability.ALL_TO_ALL, Capability.PERMUTE_ROWS, Capability.AUTODIFF)
_DIM, _LOCAL = 5, 4
"""Size of a token, and experts of each rank: enough for a token whose choices all live on one."""
_HEADER = 96
"""Bytes that a rank tells each other one of its input: twelve int64."""


@dataclass(frozen=True)
class _Tokens:
    """Tokens, choices, weights and cotangents of every rank; small integers in float32."""

    experts: int
    indices: list[np.ndarray]
    tokens: list[np.ndarray]
    weights: list[np.ndarray]
    cotangents: list[np.ndarray]

    @classmethod
    def of(cls, case: Case, choices: str, *key: int) -> _Tokens:
        make, _ = CHOICES[choices]
        experts = _LOCAL * case.ranks
        indices = make(case.rng(77, *key), case.ranks, experts)
        case.note(choices=choices, indices=[i.tolist() for i in indices])

        def integers(what: int, width: int) -> list[np.ndarray]:
            draw = [case.rng(what, r, *key).integers(-4, 5, size=(len(i), width)) for r, i in enumerate(indices)]
            return [x.astype(np.float32) for x in draw]

        return cls(experts, indices, integers(1, _DIM), [x + 6 for x in integers(2, TOP_K)], integers(3, _DIM))

    def wanted(self, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Output and gradients of tokens and weights of a rank."""
        x, g, indices = self.tokens[rank], self.cotangents[rank], self.indices[rank]
        factors = np.where(indices < self.experts, indices + 1, 0).astype(np.float32)
        scale = (factors * self.weights[rank]).sum(axis=1, keepdims=True, dtype=np.float32)
        return scale * x, scale * g, factors * (g * x).sum(axis=1, keepdims=True)

    def copies(self, ranks: int) -> list[np.ndarray]:
        """Of each rank's tokens, which go to which rank, ``[T, R]``."""
        return [copies(indices, ranks, self.experts) for indices in self.indices]


def _mesh(case: Case) -> Any:
    return case.mesh((case.ranks,), ("ep",))


def _dispatch(case: Case, mesh: Any, tokens: np.ndarray, indices: np.ndarray, weights: np.ndarray) -> tuple[Any, ...]:
    x, numbers, w = (case.tensor(of) for of in (tokens, indices, weights))
    return dispatch_tokens(x, numbers, w, mesh, num_experts=_LOCAL * case.ranks)


def _multiplying(case: Case) -> RoutedExperts:
    """The experts of this rank: number ``n`` here multiplies by ``1 + n`` and the experts of the ranks before it."""
    xp, first = case.xp, _LOCAL * case.rank

    def experts(tokens: Any, numbers: Any, weights: Any, *, rows: int | None = None) -> Any:
        factors = xp.where(numbers < _LOCAL, numbers + (first + 1), xp.zeros_like(numbers))
        scale = xp.sum(weights * xp.astype(factors, weights.dtype), axis=1)
        return xp.expand_dims(scale, axis=1) * tokens

    return experts


def _agree(case: Case, data: _Tokens, experts: RoutedExperts) -> None:
    """Demand output and gradients of tokens and weights, all exact."""
    me = case.rank
    numbers = case.tensor(data.indices[me])
    out, gradients = case.gradients(
        lambda x, w: experts(x, numbers, w), [data.tokens[me], data.weights[me]], data.cotangents[me]
    )
    told = ("sums of the tokens", "gradient of the tokens", "gradient of the weights")
    for what, got, want in zip(told, (out, *gradients), data.wanted(me), strict=True):
        case.equal(got, want, what)


# ------------------------------------------------------------------------------------------------- there and back
@requirement(
    "TOKENS-layout",
    "A token reaches each rank that owns one of its experts, and once: by source rank and in order, bit for bit, with "
    "its weights, and with that rank's experts numbered from 0 and all others nobody.",
    port=PORT,
    capabilities=_SEND,
    needs=(
        *("A2A-zero-splits", "A2A-integers", "A2A-not-recorded", "CUSTOM-several-outputs", "CUSTOM-needed"),
        *("XP-astype", "XP-broadcast-to", "XP-concat", "XP-cumulative-sum", "XP-searchsorted", "XP-sum", "XP-where"),
        *("XP-full", "XP-max", "XP-min", "XP-minimum", "XP-stack", "XP-take", "HOST-arange", "XP-getitem"),
    ),
)
def layout(case: Case) -> None:
    for choices in ("random", "duplicates", "hot-rank", "empty-rank", "all-empty"):
        data, me = _Tokens.of(case, choices), case.rank
        weights = [case.normal(i.shape, 5, r) for r, i in enumerate(data.indices)]
        tokens = [case.normal(x.shape, 6, r) for r, x in enumerate(data.tokens)]
        *arrived, context = _dispatch(case, _mesh(case), tokens[me], data.indices[me], weights[me])
        here = [c[:, me] for c in data.copies(case.ranks)]
        numbers = np.concatenate([i[h] for i, h in zip(data.indices, here, strict=True)]) - _LOCAL * me
        numbers = np.where((numbers < 0) | (numbers > _LOCAL), _LOCAL, numbers)
        wanted = [np.concatenate([x[h] for x, h in zip(of, here, strict=True)]) for of in (tokens, weights)]
        case.equal(arrived[0], wanted[0], "tokens that arrived")
        case.equal(arrived[1], numbers, "numbers of their experts")
        case.equal(arrived[2], wanted[1], "their weights")
        case.is_true(context.rows == int((numbers < _LOCAL).sum()), f"context.rows is {context.rows}")


def _exchange(choices: str) -> Requirement:
    def check(case: Case) -> None:
        data = _Tokens.of(case, choices)
        _agree(case, data, over_ranks(_multiplying(case), _mesh(case), data.experts))

    return requirement(
        f"TOKENS-{choices}",
        "Tokens that go to their experts come back weighted and added up, with the gradients of tokens and of weights, "
        f"where {CHOICES[choices][1]}.",
        port=PORT,
        capabilities=_BOTH_WAYS,
        needs=("TOKENS-layout", "SUM-rows-no-row", "A2A-grad-zero-rows", "XP-grad-reductions", "XP-grad-shapes")
        if choices == "random"
        else ("TOKENS-random",),
    )(check)


EXCHANGES = tuple(_exchange(choices) for choices in CHOICES)


@requirement(
    "TOKENS-int32",
    "Numbers of experts may be int32.",
    port=PORT,
    capabilities=_BOTH_WAYS,
    needs=("TOKENS-nobody",),
)
def int32(case: Case) -> None:
    data = _Tokens.of(case, "nobody")
    data.indices[:] = [i.astype(np.int32) for i in data.indices]
    _agree(case, data, over_ranks(_multiplying(case), _mesh(case), data.experts))


@requirement(
    "TOKENS-strided",
    "Tokens, numbers, weights and cotangents may be transposed views, and a cotangent an expanded one.",
    port=PORT,
    capabilities=_BOTH_WAYS,
    needs=("TOKENS-random", "A2A-grad-strided-cotangent"),
)
def strided(case: Case) -> None:
    data, me, xp = _Tokens.of(case, "random"), case.rank, case.xp
    experts = over_ranks(_multiplying(case), _mesh(case), data.experts)
    numbers = xp.permute_dims(case.tensor(np.ascontiguousarray(data.indices[me].T)), (1, 0))
    x, w, g = (np.ascontiguousarray(of[me].T) for of in (data.tokens, data.weights, data.cotangents))

    def transposed(x: Any, w: Any) -> Any:
        return xp.permute_dims(experts(xp.permute_dims(x, (1, 0)), numbers, xp.permute_dims(w, (1, 0))), (1, 0))

    out, gradients = case.gradients(transposed, [x, w], g)
    for what, got, want in zip(("sums", "tokens", "weights"), (out, *gradients), data.wanted(me), strict=True):
        case.equal(got, want.T, f"{what}, transposed")
    # The cotangent of a sum is one number, seen in every place.
    data.cotangents[me] = np.full_like(data.cotangents[me], 2)
    _, gradients = case.gradients(lambda x, w: xp.sum(transposed(x, w)), [x, w], np.array(2, np.float32))
    for what, got, want in zip(("tokens", "weights"), gradients, data.wanted(me)[1:], strict=True):
        case.equal(got, want.T, f"gradient of the {what} of a sum")


@requirement(
    "TOKENS-frozen",
    "Weights may want no gradient, or tokens none, on all ranks or on some of them: every rank takes part in backward, "
    "and the other gradient is whole.",
    port=PORT,
    capabilities=_BOTH_WAYS,
    needs=("TOKENS-random",),
)
def frozen(case: Case) -> None:
    data, me = _Tokens.of(case, "random"), case.rank
    experts = over_ranks(_multiplying(case), _mesh(case), data.experts)
    x, w, numbers = (case.tensor(of[me]) for of in (data.tokens, data.weights, data.indices))
    want = dict(zip(("output", "tokens", "weights"), data.wanted(me), strict=True))
    for even, odd in (("tokens", "tokens"), ("weights", "weights"), ("tokens", "weights")):
        wanted = odd if me % 2 else even
        case.note(wanted=f"gradient of {even} on even ranks, of {odd} on odd ones")
        if wanted == "tokens":
            out, (gradient,) = case.gradients(lambda x: experts(x, numbers, w), [x], data.cotangents[me])
        else:
            out, (gradient,) = case.gradients(lambda w: experts(x, numbers, w), [w], data.cotangents[me])
        case.equal(out, want["output"], "sums of the tokens")
        case.equal(gradient, want[wanted], f"gradient of the {wanted}")


@requirement(
    "TOKENS-zero-cotangent",
    "A cotangent of zeros on one rank takes part in backward as any other: the gradients of the other ranks are whole.",
    port=PORT,
    capabilities=_BOTH_WAYS,
    needs=("TOKENS-random",),
)
def zero_cotangent(case: Case) -> None:
    for idle in range(case.ranks):
        case.note(idle=idle)
        data = _Tokens.of(case, "random")
        data.cotangents[idle] = np.zeros_like(data.cotangents[idle])
        _agree(case, data, over_ranks(_multiplying(case), _mesh(case), data.experts))


@requirement(
    "TOKENS-many",
    "Two thousand wide tokens of each rank that all go to one rank are as right as a few.",
    port=PORT,
    level=Level.STRESS,
    capabilities=_BOTH_WAYS,
    needs=("TOKENS-hot-rank",),
)
def many(case: Case) -> None:
    data = _Tokens.of(case, "hot-rank")
    count, width = 2000, 10 * _DIM

    def tiled(arrays: list[np.ndarray], columns: int) -> list[np.ndarray]:
        return [np.tile(a, (count // len(a), columns // a.shape[1])) for a in arrays]

    indices, weights = (tiled(of, TOP_K) for of in (data.indices, data.weights))
    wide = _Tokens(data.experts, indices, tiled(data.tokens, width), weights, tiled(data.cotangents, width))
    case.notes.clear()  # nobody reads thousands of indices
    case.note(tokens=[len(i) for i in indices], width=width)
    _agree(case, wide, over_ranks(_multiplying(case), _mesh(case), data.experts))


@requirement(
    "TOKENS-memory",
    "Nothing of an exchange outlives its graph: contexts are freed when output and pullback are dropped.",
    port=PORT,
    capabilities=_BOTH_WAYS,
    needs=("TOKENS-random", "CUSTOM-freed"),
)
def memory(case: Case) -> None:
    data, mesh, me = _Tokens.of(case, "random"), _mesh(case), case.rank
    contexts: list[weakref.ref[Any]] = []

    def layer(x: Any, numbers: Any, w: Any) -> Any:
        *arrived, context = dispatch_tokens(x, numbers, w, mesh, num_experts=data.experts)
        contexts.append(weakref.ref(context))
        return combine_tokens(_multiplying(case)(*arrived), context)

    _agree(case, data, layer)
    layer(*(case.tensor(of[me]) for of in (data.tokens, data.indices, data.weights)))
    alive = [number for number, context in enumerate(contexts) if not freed(context)]
    case.is_true(not alive, f"the contexts of calls {alive} of {len(contexts)} are still alive")


@requirement(
    "TOKENS-interleaved",
    "Exchanges may be under way at once: backward in the order of forward, each with a context of its own.",
    port=PORT,
    capabilities=_BOTH_WAYS,
    needs=("TOKENS-nobody", "TOKENS-hot-rank"),
)
def interleaved(case: Case) -> None:
    names, me = ("random", "hot-rank", "nobody"), case.rank
    several = [_Tokens.of(case, name, n) for n, name in enumerate(names)]
    mesh, experts = _mesh(case), several[0].experts
    dispatched = [_dispatch(case, mesh, d.tokens[me], d.indices[me], d.weights[me]) for d in several]
    for number in (1, 2, 0):
        *arrived, context = dispatched[number]
        got = combine_tokens(_multiplying(case)(*arrived), context)
        case.equal(got, several[number].wanted(me)[0], f"sums of the exchange with choices {names[number]}")
    layer = over_ranks(_multiplying(case), mesh, experts)
    under_way = []
    for data in several:
        numbers = case.tensor(data.indices[me])
        primals = (case.tensor(of[me]) for of in (data.tokens, data.weights))
        under_way.append(case.platform.vjp(lambda x, w, n=numbers: layer(x, n, w), *primals))
    for name, data, (_, pullback) in zip(names, several, under_way, strict=True):
        got = case.platform.to_host(*pullback(case.tensor(data.cotangents[me])))
        case.equal(got[0], data.wanted(me)[1], f"gradient of tokens with choices {name}")
        case.equal(got[1], data.wanted(me)[2], f"gradient of weights with choices {name}")


@requirement(
    "TOKENS-deterministic",
    "The same tokens give the same bits from run to run, in sums and gradients, also where other ones ran in between.",
    port=PORT,
    capabilities=_BOTH_WAYS,
    needs=("TOKENS-duplicates",),
)
def deterministic(case: Case) -> None:
    mesh = _mesh(case)

    def run(choices: str) -> list[np.ndarray]:
        data, me = _Tokens.of(case, choices), case.rank
        # Rounding shows the order of additions: terms of all sizes, several from each rank.
        x, w, g = (case.normal(of[me].shape, n, me) for n, of in enumerate((data.tokens, data.weights, data.tokens)))
        numbers = case.tensor(data.indices[me])
        local = routed_from_rows(case.platform, lambda rows, counts: rows * rows, _LOCAL)
        layer = over_ranks(local, mesh, data.experts)
        out, gradients = case.gradients(lambda x, w: layer(x, numbers, w), [np.exp(3 * x), w], g)
        return [out, *gradients]

    first = run("random")
    for between in (1, 2):
        for _ in range(between):
            run("duplicates")
        for what, got, want in zip(
            ("sums", "gradient of tokens", "gradient of weights"), run("random"), first, strict=True
        ):
            case.equal(got, want, f"{what} of another run")


@requirement(
    "TOKENS-float64",
    "Tokens and weights in float64 lose nothing on their way.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(*_BOTH_WAYS, Capability.FLOAT64),
    needs=("TOKENS-random", "A2A-float64"),
)
def float64(case: Case) -> None:
    data = _Tokens.of(case, "random")
    # 31 bits after a one, in values whose products and sums float64 holds and float32 does not.
    fine = 1 + 2.0**-31
    for of in (data.tokens, data.cotangents, data.weights):
        of[:] = [x.astype(np.float64) for x in of]
    data.weights[:] = [w * fine for w in data.weights]
    me = case.rank
    numbers = case.tensor(data.indices[me])
    layer = over_ranks(_multiplying(case), _mesh(case), data.experts)
    out, gradients = case.gradients(
        lambda x, w: layer(x, numbers, w), [data.tokens[me], data.weights[me]], data.cotangents[me]
    )
    factors = data.indices[me] + 1.0
    scale = (factors * data.weights[me]).sum(axis=1, keepdims=True)
    case.equal(out, scale * data.tokens[me], "sums of the tokens")
    case.equal(gradients[0], scale * data.cotangents[me], "gradient of the tokens")
    dots = (data.cotangents[me] * data.tokens[me]).sum(axis=1, keepdims=True)
    case.equal(gradients[1], factors * dots, "gradient of the weights")


@requirement(
    "TOKENS-bfloat16",
    "Tokens in bfloat16 travel bit for bit, in two bytes a number, beside weights in float32; what is added up for one "
    "is added in float32 at least, over its experts and over its ranks, forward and backward.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(*_BOTH_WAYS, Capability.BFLOAT16),
    needs=("TOKENS-duplicates", "A2A-bfloat16", "SUM-rows-bfloat16"),
)
def bfloat16(case: Case) -> None:
    data, me, mesh = _Tokens.of(case, "random"), case.rank, _mesh(case)
    weights = [w + np.float32(2**-18) for w in data.weights]
    numbers = case.tensor(data.indices[me])
    with watching(case) as messages:
        x, _, w, _ = dispatch_tokens(
            case.tensor(data.tokens[me], "bfloat16"), numbers, case.tensor(weights[me]), mesh, num_experts=data.experts
        )
    there = data.copies(case.ranks)
    case.is_true(x.dtype == case.dtype("bfloat16"), f"the tokens came as {x.dtype}")
    for what, got, of in (("tokens", x, data.tokens), ("weights", w, weights)):
        case.equal(case.host(got), np.concatenate([a[t[:, me]] for a, t in zip(of, there, strict=True)]), what)
    if case.ranks > 1:
        want = [_HEADER + int(n) * (2 * _DIM + 8 * TOP_K) for n in there[me].sum(axis=0)]
        case.equal(np.array(sent(messages, case.ranks)), np.array(want), "bytes that were sent to each rank")

    # 256 + 1 is 256 in bfloat16, which a running sum in that dtype would never leave.
    one = [np.ones((1, _DIM), np.float32)] * case.ranks
    w = np.array([[256, 1, 1]], np.float32)
    last = _LOCAL * (case.ranks - 1)
    apart = _LOCAL * (np.arange(TOP_K) if case.ranks >= TOP_K else np.minimum(np.arange(TOP_K), case.ranks - 1))
    identity = routed_from_rows(case.platform, lambda rows, counts: rows + 0, _LOCAL)
    layer = over_ranks(identity, mesh, data.experts)
    for where, owners in (("on one rank", last + np.arange(TOP_K)), ("on several ranks", apart)):
        numbers = case.tensor(owners.reshape(1, TOP_K))
        x, g = (case.tensor(of[me], "bfloat16") for of in (one, one))
        out, (grad_x, grad_w) = case.gradients(lambda x, w, n=numbers: layer(x, n, w), [x, case.tensor(w)], g)
        case.equal(out.astype(np.float32), 258 * one[me], f"sum of three experts {where}")
        case.equal(grad_x.astype(np.float32), 258 * one[me], f"gradient of a token with three experts {where}")
        case.equal(grad_w, np.full_like(w, _DIM), f"gradient of the weights of three experts {where}")


# ----------------------------------------------------------------------------------------------------------- cost
@requirement(
    "TOKENS-cost",
    "An exchange of tokens makes one host copy, and none on the way back or in backward.",
    port=PORT,
    capabilities=_BOTH_WAYS,
    needs=("TOKENS-random",),
)
def cost(case: Case) -> None:
    data, me, mesh = _Tokens.of(case, "random"), case.rank, _mesh(case)
    numbers = case.tensor(data.indices[me])
    seen: dict[str, dict[str, int]] = {}

    def forward(x: Any, w: Any) -> Any:
        with case.counting("to_host") as seen["dispatch"]:
            x, here, w, context = dispatch_tokens(x, numbers, w, mesh, num_experts=data.experts)
        local = routed_from_rows(case.platform, lambda rows, counts: rows + 0, _LOCAL)
        with case.counting("to_host") as seen["combine, and the sums before it"]:
            return combine_tokens(local(x, here, w, rows=context.rows), context)

    _, pullback = case.platform.vjp(forward, *(case.tensor(of[me]) for of in (data.tokens, data.weights)))
    cotangent = case.tensor(data.cotangents[me])
    with case.counting("to_host") as seen["backward"]:
        pullback(cotangent)
    for part, counts in seen.items():
        allowed = int(part == "dispatch")
        case.is_true(counts["to_host"] == allowed, f"{part} made {counts['to_host']} host copies, must be {allowed}")


@requirement(
    "TOKENS-bytes",
    "What crosses is what must: each token once to a rank, its sum back, as much again in backward; 8 bytes a choice "
    "with the token, 4 with its gradient; and 96 bytes from each rank to each other one.",
    port=PORT,
    capabilities=_BOTH_WAYS,
    needs=("TOKENS-duplicates", "TOKENS-nobody"),
    min_ranks=2,
)
def wire(case: Case) -> None:
    mesh, me = _mesh(case), case.rank
    for choices in ("random", "duplicates", "nobody", "empty-rank"):
        data = _Tokens.of(case, choices)
        layer = over_ranks(_multiplying(case), mesh, data.experts)
        numbers = case.tensor(data.indices[me])
        primals = [case.tensor(of[me]) for of in (data.tokens, data.weights)]
        with watching(case) as forward:
            _, pullback = case.platform.vjp(lambda x, w, f=layer, n=numbers: f(x, n, w), *primals)
        cotangent = case.tensor(data.cotangents[me])
        with watching(case) as backward:
            pullback(cotangent)
        there = np.stack([c.sum(axis=0) for c in data.copies(case.ranks)])  # [R, R], from and to
        to, back = there[me], there[:, me]
        token = 4 * _DIM
        wanted = {
            "forward": _HEADER + to * (token + 8 * TOP_K) + back * token,
            "backward": to * token + back * (token + 4 * TOP_K),
        }
        for part, messages in (("forward", forward), ("backward", backward)):
            case.equal(np.array(sent(messages, case.ranks)), wanted[part], f"bytes to each rank in {part}")


# -------------------------------------------------------------------------------------------------------- two levels
def _two_levels(case: Case, shape: Sequence[int], experts: int) -> tuple[RoutedExperts, Any]:
    mesh = case.mesh(tuple(shape), ("node", "ep"))
    inside = over_ranks(_multiplying(case), mesh["ep"], _LOCAL * shape[1])
    return over_ranks(inside, mesh["node"], experts), mesh


@requirement(
    "TOKENS-levels",
    "Two levels, between nodes and then inside one, on every shape of mesh, are the exchange in one level in sums and "
    "both gradients.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(*_BOTH_WAYS, Capability.SUBGROUPS),
    needs=(*(f"TOKENS-{name}" for name in CHOICES), "MESH-lines", "GROUP-a2a", "GROUP-gradients"),
    min_ranks=4,
)
def levels(case: Case) -> None:
    one = _mesh(case)
    for nodes in (n for n in range(1, case.ranks + 1) if case.ranks % n == 0):
        shape = (nodes, case.ranks // nodes)
        case.note(mesh=shape)
        layer, _ = _two_levels(case, shape, _LOCAL * case.ranks)
        for choices in CHOICES if 1 < nodes < case.ranks else ("nobody",):
            data = _Tokens.of(case, choices)
            _agree(case, data, layer)
            _agree(case, data, over_ranks(_multiplying(case), one, data.experts))


@requirement(
    "TOKENS-levels-cost",
    "Two levels make one host copy each and none in backward; a token crosses to another node once, whichever of its "
    "ranks own its experts, and is sent on there once to each of them, both ways, with the bytes of one level.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(*_BOTH_WAYS, Capability.SUBGROUPS),
    needs=("TOKENS-levels", "TOKENS-bytes", "TOKENS-cost"),
    min_ranks=4,
)
def levels_cost(case: Case) -> None:
    nodes = next((n for n in range(2, case.ranks) if case.ranks % n == 0), case.ranks)
    inner, me = case.ranks // nodes, case.rank
    node, place = divmod(me, inner)
    data = _Tokens.of(case, "nobody")
    layer, mesh = _two_levels(case, (nodes, inner), data.experts)
    numbers = case.tensor(data.indices[me])
    primals = [case.tensor(of[me]) for of in (data.tokens, data.weights)]
    with case.counting("to_host") as copied, watching(case) as forward:
        _, pullback = case.platform.vjp(lambda x, w: layer(x, numbers, w), *primals)
    cotangent = case.tensor(data.cotangents[me])
    with case.counting("to_host") as copied_back, watching(case) as backward:
        pullback(cotangent)
    case.is_true(copied["to_host"] == 2, f"forward made {copied['to_host']} host copies, must be 2")
    case.is_true(not copied_back["to_host"], f"backward made {copied_back['to_host']} host copies, must be none")

    to_node, to_rank = data.copies(nodes), data.copies(case.ranks)
    same_place = [n * inner + place for n in range(nodes)]
    outer = np.stack([to_node[r].sum(axis=0) for r in same_place])  # [nodes, nodes], from and to, at this place

    def relayed(by: int) -> np.ndarray:
        """Tokens that a rank of this node got from its place on all nodes, by the ranks here that they go on to."""
        sources = [n * inner + by for n in range(nodes)]
        return np.concatenate([to_rank[r][:, node * inner : (node + 1) * inner] for r in sources]).sum(axis=0)

    inside = np.stack([relayed(by) for by in range(inner)])  # [inner, inner], from and to, on this node
    token = 4 * _DIM
    for name, there, position in (("node", outer, node), ("ep", inside, place)):
        group = mesh[name].get_group()
        to, back = there[position], there[:, position]
        # A level of one rank sends nothing but its header, to itself.
        header, to, back = (_HEADER, to, back) if len(there) > 1 else (_HEADER, 0 * to, 0 * back)
        wanted = {
            "forward": header + to * (token + 8 * TOP_K) + back * token,
            "backward": to * token + back * (token + 4 * TOP_K),
        }
        for part, messages in (("forward", forward), ("backward", backward)):
            got = sent([m for m in messages if m.group is group], len(there))
            case.equal(np.array(got), wanted[part], f"bytes to each rank of {name!r} in {part}")


# ------------------------------------------------------------------------------------------------------------ faults
def _fault(name: str, demand: str, kind: type[Exception], words: str, spoil: Any, min_ranks: int = 1) -> Requirement:
    def check(case: Case) -> None:
        mesh, experts = _mesh(case), _LOCAL * case.ranks
        for guilty in range(case.ranks):
            case.note(guilty=guilty)
            given = np.ones((4, _DIM), np.float32), np.zeros((4, TOP_K), np.int64), np.ones((4, TOP_K), np.float32)
            spoiled = spoil(*given, experts) if case.rank == guilty else given
            attempt = functools.partial(_dispatch, case, mesh, *spoiled)
            case.raises(kind, attempt, f"rank {guilty}", words)
            # The ranks are still in step.
            x, _, _, context = _dispatch(case, mesh, *given)
            case.equal(combine_tokens(x + 0, context), given[0], "tokens of the exchange after the error")

    return requirement(
        f"FAULT-{name}",
        f"{demand} on one rank raises the same error, which names that rank, on every rank.",
        port=PORT,
        capabilities=_BOTH_WAYS,
        needs=("TOKENS-random",),
        min_ranks=min_ranks,
    )(check)


FAULTS = (
    _fault(
        "index-too-large",
        "A number of an expert beyond nobody",
        ValueError,
        "nobody",
        lambda x, i, w, experts: (x, i + experts + 1, w),
    ),
    _fault("index-negative", "A negative number of an expert", ValueError, "-1", lambda x, i, w, _: (x, i - 1, w)),
    _fault(
        "choices-length",
        "Choices of another number of tokens",
        ValueError,
        "[T, K]",
        lambda x, i, w, _: (x[1:].copy(), i, w),
    ),
    _fault(
        "weights-shape",
        "Weights of another shape than choices",
        ValueError,
        "[T, K]",
        lambda x, i, w, _: (x, i, w[:, 1:].copy()),
    ),
    _fault(
        "indices-float",
        "Choices that are not integers",
        TypeError,
        "int64",
        lambda x, i, w, _: (x, i.astype(np.float32), w),
    ),
    _fault(
        "weights-integer",
        "Weights that are integers",
        TypeError,
        "floating",
        lambda x, i, w, _: (x, i, w.astype(np.int64)),
    ),
    _fault(
        "token-width",
        "A token of another size",
        ValueError,
        "size",
        lambda x, i, w, _: (x[:, 1:].copy(), i, w),
        min_ranks=2,
    ),
)


@requirement(
    "FAULT-combine-sums",
    "combine refuses the sums of another number of tokens than were dispatched.",
    port=PORT,
    capabilities=_BOTH_WAYS,
    needs=("TOKENS-random",),
    min_ranks=2,
)
def combine_sums(case: Case) -> None:
    data, me = _Tokens.of(case, "hot-rank"), case.rank
    x, _, _, context = _dispatch(case, _mesh(case), data.tokens[me], data.indices[me], data.weights[me])
    more = case.xp.concat([x, case.tensor(np.ones((1, _DIM), np.float32))], axis=0)
    case.raises(ValueError, lambda: combine_tokens(more, context), "combine")
    case.equal(combine_tokens(x + 0, context), data.tokens[me], "tokens of the exchange after the error")
