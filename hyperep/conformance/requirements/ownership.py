# SPDX-License-Identifier: Apache-2.0
"""Results are values of their own: no input comes back as one, no buffer serves two calls, and nothing is changed.

Results are looked at after the next call of the same shape, after their inputs were written to, and written to
themselves. Where a framework's tensors cannot be written to, what is left is the next call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from hyperep.conformance.bits import dtypes, values
from hyperep.conformance.case import Case
from hyperep.conformance.memory import overwrite
from hyperep.conformance.requirement import requirement
from hyperep.conformance.requirements.arrays import EXAMPLES
from hyperep.platform.capabilities import Capability

_COLLECTIVES = (*(Capability.ALL_TO_ALL, Capability.ALL_GATHER, Capability.ALL_REDUCE, Capability.BROADCAST),)
Member = Callable[[Any], Any]


def _own(
    case: Case, name: str, member: Member, first: np.ndarray, second: np.ndarray, transposed: bool = False
) -> None:
    """Demand that what *member* makes of a tensor is a value of its own."""

    def made(array: np.ndarray) -> tuple[Any, Any]:
        """A tensor that owns its memory, and what the member is called with: itself, or a transposed view of it."""
        base = case.tensor(np.ascontiguousarray(array.T) if transposed else array)
        return base, case.xp.permute_dims(base, (1, 0)) if transposed else base

    case.note(member=name, shape=list(first.shape), transposed=transposed)
    base, x = made(first)
    result = member(x)
    want = case.host(result)
    case.equal(case.host(x), first, f"the input of {name}, after the call")
    again = member(made(second)[1])
    want_again = case.host(again)
    case.equal(case.host(result), want, f"the result of {name}, after another call")
    if overwrite(base, 77):
        case.equal(case.host(result), want, f"the result of {name}, after its input was written to")
    now = case.host(x)  # of a framework whose views are copies, still what it was
    if overwrite(result, 55):
        case.equal(case.host(x), now, f"the input of {name}, after its result was written to")
        case.equal(case.host(again), want_again, f"another result of {name}, after the first one was written to")
    case.equal(case.host(member(made(second)[1])), want_again, f"the result of {name}, once more")


# ------------------------------------------------------------------------------------------------------- host copies
@requirement(
    "HOST-own-results",
    "from_host and to_host copy, whatever the size, dtype and strides: no array follows a tensor, no tensor an array, "
    "and no copy another one.",
    port="host copies",
    needs=("HOST-from-host-copies", "HOST-to-host-owns", "HOST-bits"),
)
def host(case: Case) -> None:
    def views(array: np.ndarray) -> dict[str, np.ndarray]:
        if array.ndim < 2:
            return {"whole": array}
        return {
            "whole": array,
            "transposed": array.T,
            "sliced": array[::2, 1:],
            "of Fortran's order": np.asfortranarray(array),
        }

    for dtype in dtypes(case):
        for shape in ((), (5,), (6, 7), (40, 41), (300, 301)):
            original = values(case, dtype, shape)
            for name in views(original):
                case.note(dtype=dtype, shape=shape, view=name)
                given = original.copy()
                array = views(given)[name]
                want = array.copy()
                tensor = case.tensor(array, dtype)
                plain = case.tensor(array)  # without the cast, which may have copied
                given[...] = 0
                array[...] = 0
                first, second, *_ = case.platform.to_host(tensor, tensor)
                case.equal(first, want, "a tensor, after the array was overwritten")
                case.equal(case.host(plain), want, "a tensor as it came, after the array was overwritten")
                first[...] = 1
                case.equal(second, want, "an array, after another copy was overwritten")
                case.equal(case.host(tensor), want, "a tensor, after its copy was overwritten")
                third = case.host(tensor)
                case.host(case.tensor(np.zeros_like(want), dtype))
                case.equal(second, want, "an array, after another tensor was copied")
                case.equal(third, want, "an array, after another tensor was copied to the same place")
                if overwrite(tensor, 1):
                    case.equal(second, want, "an array, after the tensor was overwritten")
                if len(shape) == 2:
                    turned = case.xp.permute_dims(plain, (1, 0))
                    first = case.host(turned)
                    first[...] = 1
                    case.equal(case.host(plain), want, "a tensor, after a copy of its transposed view was overwritten")
                first = case.host(plain)
                case.is_true(first.flags.writeable, "an array from to_host cannot be written to")


# ------------------------------------------------------------------------------------------------------------ arrays
@requirement(
    "XP-own-results",
    "The functions of xp leave their inputs as they were and use no result's memory again; astype copies, also to the "
    "same dtype.",
    port="arrays",
    needs=tuple(f"XP-{name.replace('_', '-')}" for name in EXAMPLES),
)
def arrays(case: Case) -> None:
    held = []
    for name, examples in EXAMPLES.items():
        for number, example in enumerate(examples):
            inputs = [case.tensor(x) for x in example.inputs]
            result = example.call(case.xp, *inputs)
            held.append((f"xp.{name}, example {number}", result, case.host(result), inputs, example.inputs))
            # The same once more, with other values of the same shapes.
            example.call(case.xp, *(case.tensor(x[::-1].copy() if x.dtype.kind == "f" else x) for x in example.inputs))
    for what, result, want, inputs, given in held:
        case.equal(case.host(result), want, f"the result of {what}, after other calls")
        for tensor, array in zip(inputs, given, strict=True):
            case.equal(case.host(tensor), array, f"an input of {what}, after the call")
    for shape in ((3, 4), (60, 61)):
        x = case.tensor(np.ones(shape, np.float32))
        copy = case.xp.astype(x, case.xp.float32)
        if overwrite(x, 5):
            case.equal(copy, np.ones(shape, np.float32), "a copy by astype, after its input was written to")


# ------------------------------------------------------------------------------------------------------- collectives
@requirement(
    "COLLECTIVES-own-results",
    "Results of collectives are new tensors, large and small, of transposed views too, in a group of one rank as in "
    "the world: inputs are left as they were, and earlier results as well.",
    port="collectives",
    capabilities=_COLLECTIVES,
    needs=("A2A-new-tensor", "AR-new-tensor", "AG-edges", "AR-max-min"),
)
def collectives(case: Case) -> None:
    for where, (group, ranks) in _groups(case).items():
        for name, member in _members(case, group, ranks).items():
            for width in (3, 3000):
                first, second = (case.normal((2 * ranks, width), n, case.rank) for n in range(2))
                for transposed in (False, True):
                    _own(case, f"{name} in {where}", member, first, second, transposed)


def _groups(case: Case) -> dict[str, tuple[Any, int]]:
    """The world, and where there are sub-groups this rank alone, which has nothing to send; with their sizes."""
    groups = {"the world": (None, case.ranks)}
    if case.supports(Capability.SUBGROUPS):
        alone = [case.platform.new_group([rank]) for rank in range(case.ranks)]
        groups["a group of one rank"] = (alone[case.rank], 1)
    return groups


def _members(case: Case, group: Any, ranks: int) -> dict[str, Member]:
    """Every collective of a group, as a function of one tensor."""
    platform, even = case.platform, [2] * ranks
    found: dict[str, Member] = {
        "all_to_all_single": lambda x: platform.all_to_all_single(x, group=group),
        "all_to_all_single with splits": lambda x: platform.all_to_all_single(x, even, even, group),
        "all_gather": lambda x: platform.all_gather(x, group),
        "all_reduce": lambda x: platform.all_reduce(x, group),
        "all_reduce by max": lambda x: platform.all_reduce(x, group, "max"),
        "all_reduce by min": lambda x: platform.all_reduce(x, group, "min"),
        "broadcast": lambda x: platform.broadcast(x, 0, group),
        "broadcast from the last": lambda x: platform.broadcast(x, ranks - 1, group),
    }
    if case.supports(Capability.REDUCE_SCATTER):
        found["reduce_scatter"] = lambda x: platform.reduce_scatter(x, group)
    if case.supports(Capability.ASYNC_COLLECTIVES):
        found["an exchange under way"] = lambda x: platform.all_to_all_single(x, group=group, async_op=True).wait()
    return found


@requirement(
    "ASYNC-own-results",
    "Exchanges of one shape that are under way at once, and those waited for before, have results of their own.",
    port="collectives",
    capabilities=(Capability.ALL_TO_ALL, Capability.ASYNC_COLLECTIVES),
    needs=("ASYNC-two-in-flight",),
)
def under_way(case: Case) -> None:
    for width in (2, 3000):
        case.note(width=width)
        parts = [[case.normal((case.ranks, width), n, r) for r in range(case.ranks)] for n in range(5)]
        wanted = [np.stack([x[case.rank] for x in of]) for of in parts]
        given = [case.tensor(of[case.rank]) for of in parts]
        works = [case.platform.all_to_all_single(x, async_op=True) for x in given[:3]]
        results = {n: works[n].wait() for n in (2, 0)}
        works += [case.platform.all_to_all_single(x, async_op=True) for x in given[3:]]
        results |= {n: works[n].wait() for n in (4, 1, 3)}
        for n, result in results.items():
            case.equal(case.host(result), wanted[n], f"rows of exchange {n}, after all others were waited for")
            case.equal(case.host(works[n].wait()), wanted[n], f"rows of exchange {n}, waited for again")
        for x in given:
            overwrite(x, 77)
        for n, result in results.items():
            case.equal(case.host(result), wanted[n], f"rows of exchange {n}, after its input was written to")


# ------------------------------------------------------------------------------------------------ rows and gradients
def _gradients_own(case: Case, name: str, function: Callable[..., Any], shapes: list[tuple[int, ...]]) -> None:
    """Demand that outputs and gradients outlive the next call, and that inputs and cotangents are left as they were."""
    case.note(member=name)

    def run(number: int) -> tuple[list[Any], list[np.ndarray], list[Any], list[np.ndarray]]:
        arrays = [case.normal(shape, number, n, case.rank) for n, shape in enumerate(shapes)]
        tensors = [case.tensor(a) for a in arrays]
        output, pullback = case.platform.vjp(function, *tensors)
        cotangents = [case.normal(tuple(output.shape), number, 99, case.rank)]
        g = case.tensor(cotangents[0])
        results = [output, *pullback(g)]
        return results, list(case.platform.to_host(*results)), [*tensors, g], arrays + cotangents

    held = [run(number) for number in range(3)]
    for results, wanted, given, arrays in held:
        for n, (got, want) in enumerate(zip(results, wanted, strict=True)):
            what = "the output" if n == 0 else f"gradient {n}"
            case.equal(case.host(got), want, f"{what} of {name}, after other calls")
        for n, (got, want) in enumerate(zip(given, arrays, strict=True)):
            what = "the cotangent" if n == len(shapes) else f"input {n + 1}"
            case.equal(case.host(got), want, f"{what} of {name}, after forward and backward")


def _moving(case: Case, index: Any, inverse: Any) -> dict[str, Member]:
    """The members that move rows, as functions of the rows."""
    one, two = (case.xp.reshape(index, (-1, terms)) for terms in (1, 2))
    return {
        "permute_rows": lambda x: case.platform.permute_rows(x, index, inverse),
        "sum_rows of one row each": lambda x: case.platform.sum_rows(x, one, inverse),
        "sum_rows of two": lambda x: case.platform.sum_rows(x, two, inverse),
    }


@requirement(
    "ROWS-own-results",
    "Results of permute_rows and sum_rows are new tensors; those and gradients of all row members are used for no "
    "other call, and inputs and cotangents are left as they were.",
    port="rows",
    capabilities=(Capability.PERMUTE_ROWS, Capability.GROUPED_MATMUL, Capability.AUTODIFF),
    needs=("SUM-rows-no-row", "GMM-empty-group", "SWIGLU-empty-group"),
)
def rows(case: Case) -> None:
    platform = case.platform
    for count, width in ((6, 3), (60, 300)):
        orders = {"": case.rng(count).permutation(count), ", the identity": np.arange(count)}
        for name, order in orders.items():
            index, inverse = case.tensor(order), case.tensor(np.argsort(order))
            first, second = (case.normal((count, width), n) for n in range(2))
            sums = _moving(case, index, inverse)
            for member_name, member in sums.items():
                what = member_name + name
                for transposed in (False, True):
                    _own(case, what, member, first, second, transposed)
                _gradients_own(case, what, member, [(count, width)])
            weighted = case.xp.reshape(index, (-1, 2))
            _gradients_own(
                case,
                f"sum_rows with weights{name}",
                lambda x, w, i=weighted, v=inverse: platform.sum_rows(x, i, v, w),
                [(count, width), (count // 2, 2)],
            )
        sizes = case.tensor(np.array([count // 2, 0, count - count // 2]))
        weight, back = (3, 8, width), (3, width, 8)
        _gradients_own(case, "swiglu", platform.swiglu, [(count, width), (count, width)])
        _gradients_own(
            case,
            "grouped_matmul",
            lambda x, w, s=sizes: platform.grouped_matmul(x, w, s),
            [(count, width), weight],
        )
        _gradients_own(
            case,
            "grouped_swiglu",
            lambda x, w1, w2, w3, s=sizes: platform.grouped_swiglu(x, w1, w2, w3, s),
            [(count, width), weight, back, weight],
        )


@requirement(
    "GRADIENTS-own-results",
    "Outputs and gradients of vjp, custom_vjp and the differentiable collectives are used for no other call, and "
    "inputs and cotangents are left as they were; the differentiable collectives return new tensors, recorded or not, "
    "in a group of one rank too.",
    port="gradients of collectives",
    capabilities=(Capability.ALL_TO_ALL, Capability.ALL_REDUCE, Capability.AUTODIFF),
    needs=("A2A-grad", "COPY-grad", "REDUCE-grad", "CUSTOM-calls"),
)
def gradients(case: Case) -> None:
    platform, ones = case.platform, [1] * case.ranks
    square = platform.custom_vjp(lambda x: (x * x, (x,)), lambda residuals, c, needed: (2 * residuals[0] * c[0],))
    for width in (3, 3000):
        for name, function in {
            "vjp": lambda x: 3 * x,
            "custom_vjp": lambda x: square(x),
            "differentiable_all_to_all_single": lambda x: platform.differentiable_all_to_all_single(x, ones, ones),
            "copy_to_group": lambda x: platform.copy_to_group(x),
            "reduce_from_group": lambda x: platform.reduce_from_group(x),
        }.items():
            _gradients_own(case, name, function, [(case.ranks, width)])
        for where, (group, ranks) in _groups(case).items():
            even = [1] * ranks
            exchange = functools.partial(
                platform.differentiable_all_to_all_single, input_splits=even, output_splits=even
            )
            for name, function in {
                "copy_to_group": platform.copy_to_group,
                "reduce_from_group": platform.reduce_from_group,
                "differentiable_all_to_all_single": exchange,
            }.items():
                first, second = (case.normal((ranks, width), n, case.rank) for n in range(2))
                member = functools.partial(function, group=group)
                for transposed in (False, True):
                    _own(case, f"{name} in {where}", member, first, second, transposed)
                _own(case, f"{name} in {where}, recorded", functools.partial(_recorded, case, member), first, second)


def _recorded(case: Case, member: Member, x: Any) -> Any:
    """The result of *member* where it is differentiated."""
    return case.platform.vjp(member, x)[0]


# ----------------------------------------------------------------------------------------------------------- modules
@requirement(
    "MOD-own-memory",
    "A module, and what is assigned, copies the tensors that it is given, whatever their size: no parameter or buffer "
    "follows them, and they follow no parameter.",
    port="modules",
    capabilities=(Capability.MODULES,),
    needs=("MOD-own-values",),
)
def modules(case: Case) -> None:
    platform, xp = case.platform, case.xp
    for shape in ((3, 4), (60, 61)):
        for transposed in (False, True):
            case.note(shape=shape, transposed=transposed)
            w, b, new = (case.normal(shape, n) for n in range(3))
            bases = [case.tensor(a.T.copy() if transposed else a) for a in (w, b, new)]
            given = [xp.permute_dims(base, (1, 0)) if transposed else base for base in bases]
            module = platform.make_module("Own", {"w": given[0]}, lambda m, x: m.w * x + m.b, buffers={"b": given[1]})
            handles = [platform.parameters(module)["w"], platform.buffers(module)["b"]]
            for handle, base, want in zip(handles, bases, (w, b), strict=False):
                if overwrite(base, 77):
                    case.equal(platform.local(handle), want, "what a module holds, after its tensor was written to")
            for handle in handles:
                platform.assign(handle, given[2])
                platform.assign(handle, case.tensor(-new))
                case.equal(given[2], new, "a tensor that was assigned, after another one was")
                platform.assign(handle, given[2])
            if overwrite(bases[2], 77):
                for handle in handles:
                    case.equal(platform.local(handle), new, "what was assigned, after its tensor was written to")
            # One parameter is assigned to another one, and then changed.
            platform.assign(handles[0], case.tensor(w))
            platform.assign(handles[1], platform.local(handles[0]))
            platform.assign(handles[0], case.tensor(new))
            case.equal(platform.local(handles[1]), w, "a buffer that was assigned a parameter, after that was changed")
