# SPDX-License-Identifier: Apache-2.0
"""The order of additions is fixed: a call gives the same bits each time, whoever comes first, and on every rank."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

import hyperep
from hyperep.conformance.case import Case
from hyperep.conformance.requirement import Level, requirement
from hyperep.moe import MoEConfig, RouterConfig, build_moe
from hyperep.platform.capabilities import Capability

_RUNS = 5


def _spread(case: Case, shape: tuple[int, ...], *key: int) -> np.ndarray:
    """Terms of very different size: each order of additions rounds in its own way."""
    return np.asarray(case.normal(shape, *key) * np.exp(6 * case.normal(shape, *key, 1)), np.float32)


def _repeats(case: Case, run: Callable[[], dict[str, Any]], between: Callable[[], Any], runs: int = _RUNS) -> None:
    """Demand the same bits of each run, with something else in between; several times, as a fault may come in turns."""
    first = run()
    for number in range(1, runs):
        for _ in range(number % 3):
            between()
        for what, got in run().items():
            case.equal(got, first[what], f"{what} of run {number}, against the first one")


def _gradients(case: Case, function: Callable[..., Any], primals: list[np.ndarray]) -> dict[str, Any]:
    # One call a run and no more: a fault at every second call would not be seen at every second call.
    output, pullback = case.platform.vjp(function, *(case.tensor(p) for p in primals))
    gradients = pullback(case.tensor(_spread(case, tuple(output.shape), 50)))
    out, *found = case.platform.to_host(output, *gradients)
    return {"output": out, **{f"gradient {n}": g for n, g in enumerate(found)}}


@requirement(
    "XP-same-bits",
    "Sums, running sums and products of xp, and the gradients of gathers, are the same bits at each call.",
    port="arrays",
    capabilities=(Capability.AUTODIFF,),
    needs=("XP-grad-indexing", "XP-grad-reductions"),
)
def arrays(case: Case) -> None:
    xp, x, w = case.xp, _spread(case, (700, 5), 1), _spread(case, (5, 4), 2)
    index = case.tensor(case.rng(3).integers(0, 9, size=2000))
    table: dict[str, tuple[Callable[..., Any], list[np.ndarray]]] = {
        "sum": (lambda x: xp.sum(x), [x]),
        "sum over an axis": (lambda x: xp.sum(x, axis=0), [x]),
        "mean": (lambda x: xp.mean(x, axis=0), [x]),
        "cumulative_sum": (lambda x: xp.cumulative_sum(x, axis=0), [x]),
        "matmul": (lambda x, w: xp.matmul(x, w), [x, w]),
        "take": (lambda x: xp.take(x, index, axis=0), [x]),
        "broadcast_to": (lambda w: xp.broadcast_to(w, (300, 5, 4)), [w]),
    }
    for name, (function, primals) in table.items():
        case.note(function=name)
        other = [-p for p in primals]
        _repeats(
            case,
            lambda f=function, p=primals: _gradients(case, f, p),  # type: ignore[misc]
            lambda f=function, p=other: _gradients(case, f, p),  # type: ignore[misc]
        )


@requirement(
    "SUM-rows-same-bits",
    "sum_rows adds the terms of a sum in the same order at each call, forward and backward, however many there are.",
    port="rows",
    capabilities=(Capability.PERMUTE_ROWS, Capability.AUTODIFF),
    needs=("SUM-rows-no-row",),
)
def sums(case: Case) -> None:
    for tokens, top_k, rows in ((6, 3, 18), (5, 8, 40), (400, 6, 2000)):
        entry = case.rng(tokens).permutation(tokens * top_k)[:rows]
        index = np.full(tokens * top_k, rows)
        index[entry] = np.arange(rows)
        told = case.tensor(index.reshape(tokens, top_k)), case.tensor(entry)
        for weighted in (True, False):
            case.note(tokens=tokens, top_k=top_k, weighted=weighted)
            primals = [_spread(case, (rows, 3), 1)] + ([_spread(case, (tokens, top_k), 2)] if weighted else [])

            def run(primals: list[np.ndarray] = primals, told: Any = told) -> dict[str, Any]:
                return _gradients(case, lambda x, *w: case.platform.sum_rows(x, *told, *w), primals)

            _repeats(case, run, lambda run=run, p=primals: run([-a for a in p]))  # type: ignore[misc]


@requirement(
    "GMM-same-bits",
    "grouped_matmul and grouped_swiglu give the same bits at each call, in output and all gradients.",
    port="rows",
    capabilities=(Capability.GROUPED_MATMUL, Capability.AUTODIFF),
    needs=("SWIGLU-empty-group",),
)
def products(case: Case) -> None:
    platform, sizes = case.platform, case.tensor(np.array([300, 0, 41]))
    x, w, back = _spread(case, (341, 4), 1), case.normal((3, 6, 4), 2), case.normal((3, 4, 6), 3)

    def product(scale: float = 1) -> dict[str, Any]:
        return _gradients(case, lambda x, w: platform.grouped_matmul(x, w, sizes), [np.float32(scale) * x, w])

    def experts(scale: float = 1) -> dict[str, Any]:
        given = [np.float32(scale) * case.normal((341, 4), 4), w, back, w]
        return _gradients(case, lambda x, w1, w2, w3: platform.grouped_swiglu(x, w1, w2, w3, sizes), given)

    for member, run in (("grouped_matmul", product), ("grouped_swiglu", experts)):
        case.note(member=member)
        _repeats(case, run, lambda run=run: run(-2))  # type: ignore[misc]


@requirement(
    "AR-same-order",
    "Sums over ranks are the same bits at each call and on every rank, whichever rank comes first: all_reduce, "
    "reduce_from_group, reduce_scatter and the backward of copy_to_group.",
    port="collectives",
    capabilities=(Capability.ALL_REDUCE, Capability.ALL_GATHER, Capability.AUTODIFF),
    needs=("AR-same-bits", "COPY-grad", "REDUCE-grad"),
    min_ranks=3,
)
def reductions(case: Case) -> None:
    platform = case.platform
    x = _spread(case, (2 * case.ranks, 64), case.rank)
    members: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: platform.all_reduce(case.tensor(x)),
        "reduce_from_group": lambda: platform.reduce_from_group(case.tensor(x)),
        "gradient of copy_to_group": lambda: case.gradients(lambda x: platform.copy_to_group(x), [x], x)[1][0],
    }
    if case.supports(Capability.REDUCE_SCATTER):
        members["reduce_scatter"] = lambda: platform.reduce_scatter(case.tensor(x))
    for name, member in members.items():
        result = member()
        first = result if isinstance(result, np.ndarray) else case.host(result)
        for late in range(case.ranks):
            if case.rank == late:
                time.sleep(0.01)
            got = member()
            case.equal(got, first, f"{name}, with rank {late} as the last")
        if name != "reduce_scatter":
            everyone = case.host(platform.all_gather(case.tensor(first[None])))
            for rank in range(case.ranks):
                case.equal(everyone[rank], first, f"{name} on rank {rank} against this rank's")


@requirement(
    "MOE-same-bits",
    "A whole layer with three choices a token gives the same bits at each step, in output and all gradients, also "
    "where other steps were between.",
    port="styles",
    capabilities=(
        *(Capability.AUTODIFF, Capability.MODULES, Capability.SHARDED_PARAMETERS, Capability.GROUPED_MATMUL),
        *(Capability.ALL_TO_ALL, Capability.PERMUTE_ROWS, Capability.ALL_REDUCE),
    ),
    needs=("MOE-top2", "EP-tokens-deterministic", "SUM-rows-same-bits", "GMM-same-bits"),
)
def layer(case: Case) -> None:
    platform, dim = case.platform, 6
    router = RouterConfig(num_experts=4 * case.ranks, top_k=3)
    moe = build_moe(platform, MoEConfig(dim=dim, hidden_dim=8, router=router), seed=3)
    mesh = case.mesh((case.ranks,), ("ep",))
    hyperep.ExpertParallel().apply(platform.named_modules(moe)["experts"], mesh)
    handles = platform.parameters(moe)
    x, g = (_spread(case, (23, dim), n, case.rank) for n in range(2))

    def run(scale: float = 1) -> dict[str, Any]:
        rows = np.float32(scale) * x
        out, gradients = case.gradients(lambda x: moe(x), [rows], g, list(handles.values()))
        return {
            "output": out,
            **{f"gradient of {n}": v for n, v in zip(("the rows", *handles), gradients, strict=True)},
        }

    _repeats(case, run, lambda: run(-0.5), runs=3)


@requirement(
    "MOD-same-order",
    "named_modules, parameters and buffers list in the same order on every rank and at every call, also after some "
    "were sharded: that in which modules were made.",
    port="modules",
    level=Level.CORE,
    capabilities=(Capability.MODULES, Capability.SHARDED_PARAMETERS, Capability.ALL_GATHER),
    needs=("MOD-paths", "SHARD-parameter"),
)
def listing(case: Case) -> None:
    platform = case.platform
    names = ["zeta", "alpha", "mid", "beta10", "beta9", "omega", "b", "a"]

    def leaf() -> Any:
        tensors = {name: case.tensor(np.zeros((case.ranks,), np.float32)) for name in names}
        buffers = {f"of_{name}": tensors[name] for name in reversed(names)}
        return platform.make_module("Leaf", tensors, lambda m: m.a, buffers=buffers)

    children = {name: leaf() for name in ("second", "first", "tenth")}
    root = platform.make_module(
        "Root", {"own": case.tensor(np.zeros(2, np.float32))}, lambda m: m.own, children=children
    )
    paths = [f"{child}.{name}" for child in children for name in names]
    backwards = [f"{child}.of_{name}" for child in children for name in reversed(names)]
    mesh = case.mesh((case.ranks,), ("ep",))
    for sharded in (False, True):
        if sharded:
            for child in ("tenth", "second"):
                hyperep.distribute_parameter(platform.named_modules(root)[child], "mid", mesh, [hyperep.Shard(0)])
        for _ in range(3):
            for what, got, want in (
                ("named_modules", platform.named_modules(root), ["", *children]),
                ("parameters", platform.parameters(root), ["own", *paths]),
                ("buffers", platform.buffers(root), backwards),
            ):
                case.is_true(list(got) == want, f"{what} lists {list(got)}, must be {want} (sharded: {sharded})")
