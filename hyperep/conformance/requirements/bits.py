# SPDX-License-Identifier: Apache-2.0
"""Nothing is narrower inside than it looks: what moves keeps every bit, and a sum loses none that it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import hyperep
from hyperep.conformance import oracle
from hyperep.conformance.bits import WIDE, dtypes, host_dtype, same_bits, values
from hyperep.conformance.case import Case
from hyperep.conformance.requirement import Level, Requirement, requirement
from hyperep.platform.capabilities import Capability

_EVERY = "in every dtype that the platform has, also values that only this dtype can hold."


# ------------------------------------------------------------------------------------------------------- host copies
@requirement(
    "HOST-bits",
    f"from_host, astype to the same dtype and to_host keep every bit, {_EVERY}",
    port="host copies",
    needs=("HOST-several", "XP-astype"),
)
def host(case: Case) -> None:
    given, sent = [], []
    for dtype in dtypes(case):
        for shape in ((), (5,), (3, 4), (40, 50)):
            array = values(case, dtype, shape)
            tensor = case.tensor(array, dtype)
            if dtype != "bfloat16":  # NumPy has none
                same_bits(case, case.tensor(array), array, dtype, f"from_host of {list(shape)}")
            same_bits(case, tensor, array, dtype, f"a tensor of {list(shape)}")
            case.equal(case.host(tensor), array, f"to_host of {list(shape)} in {dtype}")
            given.append(array)
            sent.append(tensor)
    for array, arrived in zip(given, case.platform.to_host(*sent), strict=True):
        case.equal(arrived, array, f"{array.dtype}{list(array.shape)}, copied with all others at once")


# ------------------------------------------------------------------------------------------------------- collectives
def _splits(case: Case) -> np.ndarray:
    return 1 + np.arange(case.ranks**2).reshape(case.ranks, case.ranks) % 5


def _moved(id: str, member: str, port: str, needs: tuple[str, ...], capability: Capability, check: Any) -> Requirement:
    def over_dtypes(case: Case) -> None:
        for dtype in dtypes(case):
            case.note(dtype=dtype)
            check(case, dtype)

    return requirement(
        id,
        f"{member} keeps every bit {_EVERY}",
        port=port,
        level=Level.OPTIONAL if capability is Capability.REDUCE_SCATTER else Level.CORE,
        capabilities=(capability,),
        needs=(*needs, "HOST-bits"),
    )(over_dtypes)


def _exchange(case: Case, dtype: str) -> None:
    splits, me = _splits(case), case.rank
    inputs = [values(case, dtype, (n, 3), r) for r, n in enumerate(splits.sum(axis=1))]
    x, there, back = case.tensor(inputs[me], dtype), oracle.sent(splits, me), oracle.received(splits, me)
    want = oracle.all_to_all(inputs, splits, me)
    same_bits(case, case.platform.all_to_all_single(x, back, there), want, dtype, "received rows")
    if case.supports(Capability.ASYNC_COLLECTIVES):
        work = case.platform.all_to_all_single(x, back, there, async_op=True)
        same_bits(case, work.wait(), want, dtype, "rows received by an exchange under way")


def _gather(case: Case, dtype: str) -> None:
    parts = [values(case, dtype, (2, 3), r) for r in range(case.ranks)]
    got = case.platform.all_gather(case.tensor(parts[case.rank], dtype))
    same_bits(case, got, np.concatenate(parts), dtype, "gathered rows")


def _broadcast(case: Case, dtype: str) -> None:
    for source in (0, case.ranks - 1):
        own = case.tensor(values(case, dtype, (2, 3), case.rank), dtype)
        want = values(case, dtype, (2, 3), source)
        same_bits(case, case.platform.broadcast(own, source), want, dtype, "the source's tensor")


def _terms(case: Case, dtype: str, rows: int) -> list[tuple[str, list[np.ndarray]]]:
    """Terms of each rank whose sums are exact: one that is not zero in each place; and whole numbers of many bits."""
    owner = case.rng(5).integers(0, case.ranks, size=(rows, 3))
    alone = [np.where(owner == r, values(case, dtype, (rows, 3), r), 0) for r in range(case.ranks)]
    found = [("one term that is not zero", [t.astype(host_dtype(dtype)) for t in alone])]
    if dtype in WIDE:
        bits = {"int32": 31, "int64": 63, "float32": 24, "float64": 53}[dtype] - case.ranks.bit_length()
        draw = [case.rng(6, r).integers(-(2**bits), 2**bits, size=(rows, 3)) | 1 for r in range(case.ranks)]
        found.append(("whole numbers", [t.astype(dtype) for t in draw]))
    return found


def _total(terms: list[np.ndarray], dtype: str) -> np.ndarray:
    return np.sum(terms, axis=0, dtype=host_dtype(dtype))


def _all_reduce(case: Case, dtype: str) -> None:
    for what, terms in _terms(case, dtype, 4):
        x = case.tensor(terms[case.rank], dtype)
        same_bits(case, case.platform.all_reduce(x), _total(terms, dtype), dtype, f"sum of {what}")
    terms = [values(case, dtype, (4, 3), r) for r in range(case.ranks)]
    x = case.tensor(terms[case.rank], dtype)
    same_bits(case, case.platform.all_reduce(x, op="max"), np.max(terms, axis=0), dtype, "max")
    same_bits(case, case.platform.all_reduce(x, op="min"), np.min(terms, axis=0), dtype, "min")


def _reduce_scatter(case: Case, dtype: str) -> None:
    for what, terms in _terms(case, dtype, 2 * case.ranks):
        got = case.platform.reduce_scatter(case.tensor(terms[case.rank], dtype))
        want = _total(terms, dtype)[2 * case.rank : 2 * case.rank + 2]
        same_bits(case, got, want, dtype, f"this rank's sums of {what}")


def _permute(case: Case, dtype: str) -> None:
    order = case.rng(1).permutation(9)
    x = values(case, dtype, (9, 3))
    index, inverse = case.tensor(order), case.tensor(np.argsort(order))
    same_bits(case, case.platform.permute_rows(case.tensor(x, dtype), index, inverse), x[order], dtype, "permuted rows")


COLLECTIVES = (
    _moved("A2A-bits", "all_to_all_single", "collectives", ("A2A-integers",), Capability.ALL_TO_ALL, _exchange),
    _moved("AG-bits", "all_gather", "collectives", ("AG-values",), Capability.ALL_GATHER, _gather),
    _moved("RS-bits", "reduce_scatter", "collectives", ("RS-values",), Capability.REDUCE_SCATTER, _reduce_scatter),
    _moved("AR-bits", "all_reduce", "collectives", ("AR-max-min",), Capability.ALL_REDUCE, _all_reduce),
    _moved("BC-bits", "broadcast", "collectives", ("BC-values",), Capability.BROADCAST, _broadcast),
    _moved("PERM-bits", "permute_rows", "rows", ("PERM-values",), Capability.PERMUTE_ROWS, _permute),
)


# --------------------------------------------------------------------------------------------------------- gradients
def _floats(case: Case) -> list[str]:
    return [dtype for dtype in dtypes(case) if "float" in dtype]


def _pulled(case: Case, function: Callable[..., Any], x: np.ndarray, g: np.ndarray, dtype: str) -> tuple[Any, Any]:
    output, pullback = case.platform.vjp(function, case.tensor(x, dtype))
    return output, pullback(case.tensor(g, dtype))[0]


@requirement(
    "VJP-bits",
    f"vjp, custom_vjp and stop_gradient, residuals and cotangents among what they pass on, keep every bit {_EVERY}",
    port="autodiff",
    capabilities=(Capability.AUTODIFF,),
    needs=("CUSTOM-gradients", "STOP-gradient", "HOST-bits"),
)
def vjp(case: Case) -> None:
    def backward(residuals: Any, cotangents: Any, needed: Any) -> tuple[Any, ...]:
        (x,), (g,) = residuals, cotangents
        return (case.xp.where(x > 0, g, -x),)

    custom = case.platform.custom_vjp(lambda x: (-x, (x,)), backward)
    for dtype in _floats(case):
        case.note(dtype=dtype)
        x, g = (values(case, dtype, (4, 3), n) for n in range(2))
        output, gradient = _pulled(case, lambda x: -x, x, g, dtype)
        same_bits(case, output, -x, dtype, "output of vjp")
        same_bits(case, gradient, -g, dtype, "gradient of vjp")
        output, gradient = _pulled(case, custom, x, g, dtype)
        same_bits(case, output, -x, dtype, "output of custom_vjp")
        same_bits(case, gradient, np.where(x > 0, g, -x), dtype, "gradient, of residuals and cotangents, of custom_vjp")
        same_bits(case, case.platform.stop_gradient(case.tensor(x, dtype)), x, dtype, "stop_gradient")


@requirement(
    "A2A-grad-bits",
    f"differentiable_all_to_all_single and its backward keep every bit {_EVERY}",
    port="gradients of collectives",
    capabilities=(Capability.ALL_TO_ALL, Capability.AUTODIFF),
    needs=("A2A-grad", "A2A-bits", "VJP-bits"),
)
def exchange_gradient(case: Case) -> None:
    splits, me = _splits(case), case.rank
    there, back = oracle.sent(splits, me), oracle.received(splits, me)
    for dtype in _floats(case):
        case.note(dtype=dtype)
        inputs = [values(case, dtype, (n, 3), 1, r) for r, n in enumerate(splits.sum(axis=1))]
        cotangents = [values(case, dtype, (n, 3), 2, r) for r, n in enumerate(splits.sum(axis=0))]
        output, gradient = _pulled(
            case,
            lambda x: case.platform.differentiable_all_to_all_single(x, there, back),
            inputs[me],
            cotangents[me],
            dtype,
        )
        same_bits(case, output, oracle.all_to_all(inputs, splits, me), dtype, "received rows")
        same_bits(case, gradient, oracle.all_to_all(cotangents, splits.T, me), dtype, "their gradient")


@requirement(
    "TP-pair-bits",
    f"copy_to_group and reduce_from_group lose no bit that a sum needs, forward and backward, {_EVERY}",
    port="gradients of collectives",
    capabilities=(Capability.ALL_REDUCE, Capability.AUTODIFF),
    needs=("COPY-grad", "REDUCE-grad", "AR-bits", "VJP-bits"),
)
def pair(case: Case) -> None:
    platform = case.platform
    for dtype in _floats(case):
        for what, terms in _terms(case, dtype, 4):
            case.note(dtype=dtype, terms=what)
            own, total, other = terms[case.rank], _total(terms, dtype), values(case, dtype, (4, 3), 9, case.rank)
            output, gradient = _pulled(case, lambda x: platform.copy_to_group(x), other, own, dtype)
            same_bits(case, output, other, dtype, "output of copy_to_group")
            same_bits(case, gradient, total, dtype, "gradient of copy_to_group")
            output, gradient = _pulled(case, lambda x: platform.reduce_from_group(x), own, other, dtype)
            same_bits(case, output, total, dtype, "output of reduce_from_group")
            same_bits(case, gradient, other, dtype, "gradient of reduce_from_group")


@requirement(
    "PERM-grad-bits",
    f"The backward of permute_rows keeps every bit {_EVERY}",
    port="rows",
    capabilities=(Capability.PERMUTE_ROWS, Capability.AUTODIFF),
    needs=("PERM-grad", "PERM-bits", "VJP-bits"),
)
def permute_gradient(case: Case) -> None:
    order = case.rng(1).permutation(9)
    index, inverse = case.tensor(order), case.tensor(np.argsort(order))
    for dtype in _floats(case):
        x, g = (values(case, dtype, (9, 3), n) for n in range(2))
        _, gradient = _pulled(case, lambda x: case.platform.permute_rows(x, index, inverse), x, g, dtype)
        same_bits(case, gradient, g[np.argsort(order)], dtype, "gradient of the rows")


# ----------------------------------------------------------------------------------------------------------- modules
@requirement(
    "MOD-bits",
    f"Parameters and buffers, and what assign writes and local reads, keep dtype and every bit {_EVERY}",
    port="modules",
    capabilities=(Capability.MODULES,),
    needs=("MOD-assign", "HOST-bits"),
)
def modules(case: Case) -> None:
    platform = case.platform
    for dtype in dtypes(case):
        w, b, new = (values(case, dtype, (3, 4), n) for n in range(3))
        whole = "int" in dtype  # frameworks train no integers
        parameters = {} if whole else {"w": case.tensor(w, dtype)}
        module = platform.make_module(
            "Kept",
            parameters,
            lambda m: (m.b,) if not hasattr(m, "w") else (m.b, m.w),
            buffers={"b": case.tensor(b, dtype)},
        )
        handles = [platform.buffers(module)["b"], *platform.parameters(module).values()]
        for given, handle, seen in zip((b, w), handles, module(), strict=False):
            same_bits(case, platform.local(handle), given, dtype, "local of what a module was made with")
            same_bits(case, seen, given, dtype, "what the forward sees")
            platform.assign(handle, case.tensor(new, dtype))
            same_bits(case, platform.local(handle), new, dtype, "local of what was assigned")


@requirement(
    "SHARD-bits",
    f"Shards of parameters and buffers, and whole tensors put together of them, keep every bit {_EVERY}",
    port="modules",
    capabilities=(Capability.MODULES, Capability.SHARDED_PARAMETERS),
    needs=("SHARD-assign", "MOD-bits", "BC-bits", "AG-bits"),
)
def shards(case: Case) -> None:
    platform = case.platform
    mesh = case.mesh((case.ranks,), ("ep",))
    for dtype in dtypes(case):
        case.note(dtype=dtype)
        whole = values(case, dtype, (2 * case.ranks, 3))
        given = {"w": case.tensor(whole, dtype)}
        # Frameworks train no integers: those are buffers.
        kinds = {"buffers": given} if "int" in dtype else {}
        module = platform.make_module("Kept", {} if kinds else given, lambda m: m.w, **kinds)
        hyperep.distribute_parameter(module, "w", mesh, [hyperep.Shard(0)])
        handle = (platform.buffers if kinds else platform.parameters)(module)["w"]
        part = np.split(whole, case.ranks)[case.rank]
        same_bits(case, platform.local(handle), part, dtype, "this rank's part")
        same_bits(case, module(), part, dtype, "this rank's part, as the forward sees it")
        put_together = hyperep.sharding.gather_tensor(platform.local(handle), platform.sharding(handle))
        same_bits(case, put_together, whole, dtype, "the whole, put together")
        new = values(case, dtype, part.shape, 1, case.rank)
        platform.assign(handle, case.tensor(new, dtype))
        same_bits(case, platform.local(handle), new, dtype, "this rank's part after another one was assigned")
