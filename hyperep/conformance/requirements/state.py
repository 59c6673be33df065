# SPDX-License-Identifier: Apache-2.0
"""Nothing is remembered from call to call: no weight as it was, no operand by identity, no tensor of a past call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

import hyperep
from hyperep.conformance import oracle
from hyperep.conformance.case import Case
from hyperep.conformance.memory import freed as freed_by_now
from hyperep.conformance.memory import keeps_growing, kept_bytes, overwrite, too_many_anywhere, watch
from hyperep.conformance.requirement import Level, requirement
from hyperep.moe import GroupedExperts
from hyperep.platform.capabilities import Capability

_TOLERANCE = 1e-4
_NAMES = ("w1", "w2", "w3")
_PRODUCTS = ((4, 6), (192, 64))
"""Sizes of the products that weights are assigned to: what holds for a few numbers need not for 150 kB."""
_CALLS, _BYTES = 24, 256 * 1024
"""Calls whose memory is watched, and the size of an operand of each."""


# ----------------------------------------------------------------------------------------------------------- weights
@requirement(
    "MOD-assign-seen",
    "What is computed with a parameter or buffer after assign uses the new values, in output and gradients, whatever "
    "its size and whoever reads it: a module, a grouped product, experts.",
    port="modules",
    capabilities=(Capability.MODULES, Capability.GROUPED_MATMUL, Capability.AUTODIFF),
    needs=("MOD-assign", "MOD-gradients", "SWIGLU-grad"),
)
def assigned(case: Case) -> None:
    platform, xp, sizes = case.platform, case.xp, [3, 0, 2]
    counts = case.tensor(np.array(sizes))
    modules = {
        "a module": lambda m, x: x @ m.v,
        "matmul": lambda m, x: xp.matmul(x, m.v),
        "grouped_matmul": lambda m, x: platform.grouped_matmul(x, m.w1, counts),
        "grouped_swiglu": lambda m, x: platform.grouped_swiglu(x, m.w1, m.w2, m.w3, counts),
    }
    wanted: dict[str, Callable[..., np.ndarray]] = {
        "a module": lambda w, x: x @ w["v"],
        "matmul": lambda w, x: x @ w["v"],
        "grouped_matmul": lambda w, x: oracle.grouped_matmul(x, w["w1"], sizes),
        "grouped_swiglu": lambda w, x: oracle.experts(x, w["w1"], w["w2"], w["w3"], sizes),
    }
    rows: dict[str, Callable[..., np.ndarray]] = {
        "a module": lambda w, x, g: g @ w["v"].T,
        "matmul": lambda w, x, g: g @ w["v"].T,
        "grouped_matmul": lambda w, x, g: oracle.grouped_matmul(g, w["w1"].transpose(0, 2, 1), sizes),
        "grouped_swiglu": lambda w, x, g: oracle.experts_gradients(x, w["w1"], w["w2"], w["w3"], sizes, g)[0],
    }
    for (dim, hidden), times in zip(_PRODUCTS, (4, 2), strict=True):
        shapes = {"w1": (3, hidden, dim), "w2": (3, dim, hidden), "w3": (3, hidden, dim), "v": (dim, dim)}
        values = [{name: case.normal(shape, n, i) for i, (name, shape) in enumerate(shapes.items())} for n in range(2)]
        x = case.normal((5, dim), 7)
        for name, forward in modules.items():
            for kind in ("parameters", "buffers"):
                tensors = {key: case.tensor(value) for key, value in values[0].items()}
                held = tensors if kind == "parameters" else {}
                module = platform.make_module("User", held, forward, buffers={} if held else tensors)
                handles = getattr(platform, kind)(module)
                for number in range(times):
                    case.note(user=name, kind=kind, dim=dim, assignment=number)
                    w = values[number % 2]
                    if number:
                        for key, value in w.items():
                            platform.assign(handles[key], case.tensor(value))
                    want = wanted[name](w, x)
                    g = case.normal(want.shape, 8, number)
                    out, (gradient,) = case.gradients(module, [x], g)
                    case.close(out, want, f"output of {name} with the {kind} that were assigned last", _TOLERANCE)
                    case.close(gradient, rows[name](w, x, g), f"gradient of the rows of {name}", _TOLERANCE)


@requirement(
    "EP-assign-seen",
    "Sharded experts use the weights that were assigned last, whatever their size, forward and backward.",
    port="styles",
    capabilities=(
        *(Capability.MODULES, Capability.SHARDED_PARAMETERS, Capability.GROUPED_MATMUL, Capability.PERMUTE_ROWS),
        *(Capability.AUTODIFF, Capability.ALL_TO_ALL),
    ),
    needs=("EP-random", "SHARD-assign", "MOD-assign-seen"),
)
def sharded(case: Case) -> None:
    platform, experts = case.platform, 2 * case.ranks
    mesh, counts = case.mesh((case.ranks,), ("ep",)), np.full(experts, 2)
    tokens, sizes = case.tensor(counts), counts.tolist()
    for (dim, hidden), times in (((5, 8), 3), ((96, 160), 2)):
        module = GroupedExperts(platform, dim, hidden, experts)
        hyperep.ExpertParallel().apply(module, mesh)
        handles = platform.parameters(module)
        x, g = (case.normal((2 * experts, dim), n, case.rank) for n in range(2))
        shapes = ((experts, hidden, dim), (experts, dim, hidden), (experts, hidden, dim))
        for number in range(times):
            case.note(dim=dim, assignment=number)
            w1, w2, w3 = weights = [case.normal(shape, 9, number, n) / 2 for n, shape in enumerate(shapes)]
            for name, value in zip(_NAMES, weights, strict=True):
                part = platform.sharding(handles[name]).local_slices(value.shape)
                platform.assign(handles[name], case.tensor(value[part]))
            out, (gradient,) = case.gradients(lambda x, of=module: of(x, tokens), [x], g)
            case.close(out, oracle.experts(x, w1, w2, w3, sizes), "output with the weights assigned last", _TOLERANCE)
            want, *_ = oracle.experts_gradients(x, w1, w2, w3, sizes, g)
            case.close(gradient, want, "gradient with the weights assigned last", _TOLERANCE)


# ---------------------------------------------------------------------------------------------------------- operands
@requirement(
    "ROWS-no-memory-of-operands",
    "Indices, sizes and weights are read anew at each call, also where a tensor was written to in between, or another "
    "one of the same shape has taken its place.",
    port="rows",
    capabilities=(Capability.PERMUTE_ROWS, Capability.GROUPED_MATMUL, Capability.AUTODIFF),
    needs=("SUM-rows", "GMM-empty-group", "SWIGLU-empty-group"),
)
def operands(case: Case) -> None:
    platform = case.platform
    x, w, back = case.normal((6, 4), 1), case.normal((3, 5, 4), 2), case.normal((3, 4, 5), 3)
    rows, weight, w2, g, gh = (case.tensor(a) for a in (x, w, back, case.normal((6, 4), 4), case.normal((6, 5), 5)))

    def products(sizes: Any) -> list[Any]:
        out, pull = platform.vjp(lambda x: platform.grouped_matmul(x, weight, sizes), rows)
        done, pull_done = platform.vjp(lambda x: platform.grouped_swiglu(x, weight, w2, weight, sizes), rows)
        return [out, *pull(gh), done, *pull_done(g)]

    def moved(index: Any, inverse: Any, terms: Any) -> list[Any]:
        out, pull = platform.vjp(lambda x: platform.permute_rows(x, index, inverse), rows)
        two = case.xp.reshape(index, (3, 2))
        sums, pull_sums = platform.vjp(lambda x: platform.sum_rows(x, two, inverse), rows)
        found = [out, *pull(g), sums, *pull_sums(g[:3])]
        # The weights as they came, and as a function's inputs, which a tape may have made other tensors of.
        plain, pull_plain = platform.vjp(lambda x: platform.sum_rows(x, two, inverse, terms), rows)
        of_both, pull_both = platform.vjp(lambda x, w: platform.sum_rows(x, two, inverse, w), rows, terms)
        return [*found, plain, *pull_plain(g[:3]), of_both, *pull_both(g[:3])]

    def wanted_products(sizes: np.ndarray) -> list[np.ndarray]:
        each, ghost, cot = sizes.tolist(), case.normal((6, 5), 5), case.normal((6, 4), 4)
        return [
            oracle.grouped_matmul(x, w, each),
            oracle.grouped_matmul(ghost, w.transpose(0, 2, 1), each),
            oracle.experts(x, w, back, w, each),
            oracle.experts_gradients(x, w, back, w, each, cot)[0],
        ]

    def wanted_moved(order: np.ndarray, inverse: np.ndarray, terms: np.ndarray) -> list[np.ndarray]:
        cot, taken = case.normal((6, 4), 4), x[order].reshape(3, 2, 4)
        spread = np.repeat(cot[:3], 2, axis=0)
        sums = (taken * terms[..., None]).sum(axis=1)
        of_rows = (spread * terms.reshape(6, 1))[inverse]
        moved = [x[order], cot[inverse], taken.sum(axis=1), spread[inverse]]
        return [*moved, sums, of_rows, sums, of_rows, (taken * cot[:3, None]).sum(axis=2)]

    orders = [case.rng(20, n).permutation(6) for n in range(4)]
    several = [np.array(sizes) for sizes in ([3, 1, 2], [0, 6, 0], [2, 2, 2], [6, 0, 0])]
    weights = [case.normal((3, 2), 21, n) for n in range(4)]
    calls = [(s, o, np.argsort(o), terms) for s, o, terms in zip(several, orders, weights, strict=True)]
    same = [case.tensor(operand) for operand in calls[0]]
    for number, operands in enumerate(calls):
        s, o, inverse, terms = operands
        case.note(group_sizes=s.tolist(), index=o.tolist(), weights=terms.tolist())
        for written in (False, True):
            if written:
                # The same tensors, with other values in them, where the framework's can be written to.
                if not all(overwrite(tensor, values) for tensor, values in zip(same, operands, strict=True)):
                    continue
                given = same
            else:
                given = [case.tensor(operand) for operand in operands]
            where = "written into the tensors of the call before" if written else "in new tensors"
            got = [*products(given[0]), *moved(*given[1:])]
            want = [*wanted_products(s), *wanted_moved(o, inverse, terms)]
            for n, (a, b) in enumerate(zip(got, want, strict=True)):
                case.close(a, b, f"result {n} of call {number}, sizes, indices and weights {where}", _TOLERANCE)
            del given


# ------------------------------------------------------------------------------------------------------------ memory
def _steps(case: Case) -> dict[str, Callable[[Any], Any]]:
    """Functions of one tensor ``[rows, 64]``, of *_BYTES* bytes, each of which uses a member forward and backward."""
    platform, xp, rows = case.platform, case.xp, case.divisible(_BYTES // 256)
    splits = [rows // case.ranks] * case.ranks
    order = np.roll(np.arange(rows), 1)
    index, inverse, sizes = case.tensor(order), case.tensor(np.argsort(order)), case.tensor(np.array([rows - 5, 5]))
    weight, back = case.tensor(case.normal((2, 8, 64), 1)), case.tensor(case.normal((2, 64, 8), 2))
    # As many rows of one value as a tensor has values, each of which is the weight of one of them.
    single = case.tensor(case.normal((64 * rows, 1), 4))
    singles = case.tensor(np.arange(64 * rows))
    square = platform.custom_vjp(lambda x: (x * x, (x,)), lambda residuals, c, needed: (2 * residuals[0] * c[0],))

    def differentiated(function: Callable[..., Any]) -> Callable[[Any], Any]:
        def step(x: Any) -> Any:
            out, pullback = platform.vjp(function, x)
            return out, pullback(out)

        return step

    module = platform.make_module("Scale", {"w": case.tensor(case.normal((64,), 3))}, lambda m, x: m.w * x)
    platform.wrap_forward(module, lambda inner, x: inner(x) + 1)
    handles = list(platform.parameters(module).values())

    def trained(x: Any) -> Any:
        out, pullback = platform.vjp(module, x, parameters=handles)
        return out, pullback(out)

    def weighted(x: Any) -> Any:
        index = xp.reshape(singles, (rows, 64))
        out, pullback = platform.vjp(lambda r, w: platform.sum_rows(r, index, singles, w), single, x)
        return out, pullback(out)

    assigned = platform.make_module("Assigned", {"w": case.tensor(case.normal((rows, 64), 5))}, lambda m, x: m.w * x)
    handle, before = platform.parameters(assigned)["w"], case.tensor(case.normal((rows, 64), 6))

    def assign(x: Any) -> tuple[()]:
        platform.assign(handle, x)
        # Where nobody can write to a tensor, the one that was assigned last may be what the parameter is.
        platform.assign(handle, before)
        return ()

    optional: dict[Capability, dict[str, Callable[[Any], Any]]] = {
        Capability.REDUCE_SCATTER: {"reduce_scatter": lambda x: platform.reduce_scatter(x)},
        Capability.ASYNC_COLLECTIVES: {
            "an exchange under way": lambda x: platform.all_to_all_single(x, async_op=True).wait()
        },
        Capability.FUNCTIONAL_CALL: {
            "functional_call": differentiated(lambda x: platform.functional_call(assigned, {"w": x}, assigned, x))
        },
    }
    of_this = {name: step for of, steps in optional.items() if case.supports(of) for name, step in steps.items()}
    return of_this | {
        "assign": assign,
        "sum_rows with weights": weighted,
        "a module": trained,
        "to_host and from_host": lambda x: case.tensor(case.host(x)),
        "vjp": differentiated(lambda x: xp.exp(0.01 * x)),
        "vjp that is not pulled back": lambda x: platform.vjp(lambda x: square(xp.exp(0.01 * x)), x),
        "custom_vjp": differentiated(lambda x: square(x)),
        "all_to_all_single": lambda x: platform.all_to_all_single(x),
        "all_gather": lambda x: platform.all_gather(x),
        "all_reduce": lambda x: platform.all_reduce(x),
        "broadcast": lambda x: platform.broadcast(x, case.ranks - 1),
        "differentiable_all_to_all_single": differentiated(
            lambda x: platform.differentiable_all_to_all_single(x, splits, splits)
        ),
        "copy_to_group": differentiated(lambda x: platform.copy_to_group(x)),
        "reduce_from_group": differentiated(lambda x: platform.reduce_from_group(x)),
        "permute_rows": differentiated(lambda x: platform.permute_rows(x, index, inverse)),
        "sum_rows": differentiated(lambda x: platform.sum_rows(x, xp.reshape(index, (rows, 1)), inverse)),
        "swiglu": differentiated(lambda x: platform.swiglu(x, x)),
        "grouped_matmul": differentiated(lambda x: platform.grouped_matmul(x, weight, sizes)),
        "grouped_swiglu": differentiated(lambda x: platform.grouped_swiglu(x, weight, back, weight, sizes)),
    }


_MEMORY = (
    *(Capability.AUTODIFF, Capability.ALL_TO_ALL, Capability.ALL_GATHER, Capability.ALL_REDUCE, Capability.BROADCAST),
    *(Capability.PERMUTE_ROWS, Capability.GROUPED_MATMUL, Capability.MODULES),
)


@requirement(
    "MEMORY-freed",
    "No member keeps a tensor that it was given, or has made, once nobody else has it: not the input of the last call, "
    "no residual, no result, also if nobody pulls back or waits.",
    port="memory",
    capabilities=_MEMORY,
    needs=(
        "CUSTOM-freed",
        "MOD-gradients",
        "MOD-wrap",
        "SWIGLU-grad",
        "SUM-rows",
        "COPY-grad",
        "REDUCE-grad",
        "A2A-grad",
        "AG-values",
    ),
)
def freed(case: Case) -> None:
    shape = (case.divisible(_BYTES // 256), 64)

    def called(step: Callable[[Any], Any]) -> list[Callable[[], bool]]:
        """One call, and what tells whether its input and its results are alive."""
        x = case.tensor(case.normal(shape, 1))
        result, flat = step(x), [x]
        for item in result if isinstance(result, tuple) else (result,):
            flat += list(item) if isinstance(item, tuple) else [item]
        case.platform.to_host(*(t for t in flat if case.platform.is_tensor(t)))
        return [watch(t) for t in flat]

    for name, step in _steps(case).items():
        watched = called(step)
        kept = [number for number, is_alive in enumerate(watched) if not freed_by_now(is_alive)]
        case.is_true(not kept, f"{name}: of its input and results, {kept} are still alive after the call is over")
    if case.supports(Capability.ASYNC_COLLECTIVES):
        x = case.tensor(case.normal(shape, 1))
        works = [case.platform.all_to_all_single(x, async_op=True) for _ in range(2)]
        tensors = [watch(x), watch(works[0].wait())]
        works[1].wait()
        del x, works
        case.is_true(all(map(freed_by_now, tensors)), "an exchange under way: its input or result is alive")


@requirement(
    "MEMORY-steady",
    "The memory of a rank does not grow from call to call of any member, forward and backward.",
    port="memory",
    level=Level.STRESS,
    capabilities=_MEMORY,
    needs=("MEMORY-freed",),
)
def steady(case: Case) -> None:
    shape = (case.divisible(_BYTES // 256), 64)
    data, steps, allowed = case.normal(shape, 1), _steps(case), _CALLS * _BYTES // 2

    def grown(*names: str) -> int:
        def run(number: int) -> None:
            for name in names:
                steps[name](case.tensor(data))

        return kept_bytes(run, calls=_CALLS, barrier=case.platform.barrier)

    if not any(too_many_anywhere(case, [grown(*steps)], allowed)):
        return
    # Every member alone says which one it is.
    guilty = keeps_growing(case, {name: functools.partial(grown, name) for name in steps}, allowed)
    case.is_true(not guilty, f"bytes more after {_CALLS} calls with {_BYTES} bytes each, by member: {guilty}")
