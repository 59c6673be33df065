# SPDX-License-Identifier: Apache-2.0
"""Arithmetic is done in the dtype that it is asked for: float64 to its last digits, int64 past what floats can hold."""

from __future__ import annotations

from typing import Any

import numpy as np

import hyperep
from hyperep.conformance import compare, oracle
from hyperep.conformance.case import Case
from hyperep.conformance.requirement import Level, requirement
from hyperep.conformance.requirements.arrays import EXAMPLES, Example
from hyperep.conformance.routings import ROUTINGS
from hyperep.moe.experts import TAKES, experts_forward
from hyperep.platform.capabilities import Capability

_FLOAT64 = Capability.FLOAT64
_TOLERANCE = 1e-12
"""Relative; float32 has lost by 1e-7 what it loses."""
_NAMES = ("w1", "w2", "w3")


# ------------------------------------------------------------------------------------------------------------ arrays
def _in_float64(example: Example) -> tuple[np.ndarray, ...] | None:
    """The inputs, with the digits that float64 has over float32; nothing if none of them is a float."""
    if not any(x.dtype == np.float32 for x in example.inputs):
        return None
    digits = np.random.default_rng(13)
    return tuple(
        x + 2.0**-30 * np.abs(x) * digits.uniform(0.1, 1, size=x.shape) if x.dtype == np.float32 else x
        for x in example.inputs
    )


@requirement(
    "XP-float64",
    "The functions of xp compute in float64 where their inputs are float64, to 14 digits.",
    port="arrays",
    level=Level.OPTIONAL,
    capabilities=(_FLOAT64,),
    needs=("DTYPE-float64", *(f"XP-{name.replace('_', '-')}" for name in EXAMPLES)),
)
def arrays(case: Case) -> None:
    for name, examples in EXAMPLES.items():
        for number, example in enumerate(examples):
            inputs = _in_float64(example)
            if inputs is None:
                continue
            case.note(function=name, example=number, inputs=[f"{x.dtype}{list(x.shape)}" for x in inputs])
            want = np.asarray(example.want(*inputs))
            got = case.host(example.call(case.xp, *(case.tensor(x) for x in inputs)))
            case.is_true(got.dtype == want.dtype, f"xp.{name} of float64: dtype {got.dtype}, must be {want.dtype}")
            if want.dtype.kind == "f":
                compare.near(got, want, f"xp.{name} of float64", 1e-14)
            else:
                compare.same(got, want, f"xp.{name} of float64")
    whole = np.array([2**40 + 1, -(2**52) - 1])
    floats = whole.astype(np.float64)
    case.equal(case.xp.astype(case.tensor(whole), case.xp.float64), floats, "astype of int64 to float64")
    case.equal(case.xp.astype(case.tensor(floats), case.xp.int64), whole, "astype of float64 to int64")


@requirement(
    "XP-int64",
    "The functions and operators of xp compute in int64 where their inputs are int64, also past 2**53.",
    port="arrays",
    needs=("XP-operators", *(f"XP-{name.replace('_', '-')}" for name in EXAMPLES)),
)
def integers(case: Case) -> None:
    xp = case.xp
    # Neighbours, which a float takes for equal.
    base = 2**53 + np.array([[3, 1, 2, 0], [0, 2, 1, 3]])
    signed = base * np.array([[1, -1, 1, -1]])
    rows, columns = np.array([1, 0, 1]), np.array([[3, 0], [1, 1]])
    x, s, r, c = (case.tensor(a) for a in (base, signed, rows, columns))
    ascending = np.sort(base[0])
    table: dict[str, tuple[Any, Any]] = {
        "abs": (xp.abs(s), np.abs(signed)),
        "argsort": (xp.argsort(x, axis=1, stable=True), np.argsort(base, axis=1)),
        "argsort descending": (xp.argsort(x, axis=1, descending=True, stable=True), np.argsort(-base, axis=1)),
        "arange": (xp.arange(2**40 + 1, 2**40 + 7, 2, dtype=xp.int64), np.arange(2**40 + 1, 2**40 + 7, 2)),
        "concat": (xp.concat([x, s], axis=0), np.concatenate([base, signed])),
        "cumulative_sum": (xp.cumulative_sum(s, axis=1), signed.cumsum(axis=1)),
        "full": (xp.full((2,), 2**53 + 1, dtype=xp.int64), np.full(2, 2**53 + 1)),
        "max": (xp.max(x, axis=1), base.max(axis=1)),
        "maximum": (xp.maximum(x, x + 1), base + 1),
        "min": (xp.min(s, axis=0), signed.min(axis=0)),
        "minimum": (xp.minimum(x, x + 1), base),
        "reshape": (xp.reshape(s, (4, 2)), signed.reshape(4, 2)),
        "searchsorted": (
            xp.searchsorted(case.tensor(ascending), x[1, :], side="right"),
            np.searchsorted(ascending, base[1], side="right"),
        ),
        "stack": (xp.stack([x, s], axis=0), np.stack([base, signed])),
        "sum": (xp.sum(s), np.asarray(signed.sum())),
        "sum over an axis": (xp.sum(x, axis=0), base.sum(axis=0)),
        "take": (xp.take(x, r, axis=0), base[rows]),
        "take_along_axis": (xp.take_along_axis(x, c, axis=1), np.take_along_axis(base, columns, 1)),
        "where": (xp.where(x > s, x, s), np.where(base > signed, base, signed)),
        "x + y": (x + s, base + signed),
        "x - y": (x - s, base - signed),
        "x * 3": (x * 3, base * 3),
        "-x": (-x, -base),
        "x < y": (x < x + 1, base < base + 1),
        "x == y": (x == x + 1, base == base + 1),
        "slices": (s[:, 1:3], signed[:, 1:3]),
    }
    for what, (got, want) in table.items():
        case.equal(got, want, f"{what} of int64")
    narrow = case.tensor(np.array([2**31 - 1, 1], np.int32))
    case.equal(xp.sum(narrow), np.asarray(2**31), "sum of int32, which is int64")


@requirement(
    "XP-float64-scalars",
    "A Python float in arithmetic with a tensor of float64 keeps all its digits.",
    port="arrays",
    level=Level.OPTIONAL,
    capabilities=(_FLOAT64,),
    needs=("DTYPE-float64",),
)
def scalars(case: Case) -> None:
    x, third = np.array([[1.0, 3], [0.5, -7]]), 1 / 3
    tensor = case.tensor(x)
    for what, got, want in (
        ("x + scalar", tensor + third, x + third),
        ("scalar - x", third - tensor, third - x),
        ("scalar * x", third * tensor, third * x),
        ("x / scalar", tensor / third, x / third),
        ("scalar / x", third / tensor, third / x),
        ("full", case.xp.full((2, 2), third, dtype=case.xp.float64), np.full((2, 2), third)),
    ):
        case.close(got, want, what, 1e-15)


# -------------------------------------------------------------------------------------------------------------- rows
@requirement(
    "SUM-rows-weights",
    "Weights of sum_rows keep their own dtype, with their gradients: one in float64 beside rows in float32 is not "
    "rounded to float32 before it multiplies.",
    port="rows",
    level=Level.OPTIONAL,
    capabilities=(Capability.PERMUTE_ROWS, Capability.AUTODIFF, _FLOAT64),
    needs=("SUM-rows-no-row",),
)
def weights(case: Case) -> None:
    # The weights differ by what float32 does not know, and nothing else is left of the two rows; the third has none.
    fine = 2.0**-40
    w = np.array([[1 + fine, 1, 5], [1, 1 - fine, 5]])
    x = np.array([[1, 4], [-1, -4], [2, 8], [-2, -8]], np.float32)
    index, inverse = case.tensor(np.array([[0, 1, 4], [2, 3, 4]])), case.tensor(np.array([0, 1, 3, 4]))
    out, (grad_x, grad_w) = case.gradients(
        lambda x, w: case.platform.sum_rows(x, index, inverse, w), [x, w], np.ones((2, 2), np.float32)
    )
    case.equal(out, np.array([[fine, 4 * fine], [2 * fine, 8 * fine]], np.float32), "sums")
    case.equal(grad_x, np.ones((4, 2), np.float32), "gradient of the rows")
    case.equal(grad_w, np.array([[5, -5, 0], [10, -10, 0.0]]), "gradient of the weights")


def _rows64(case: Case, *shape: int) -> np.ndarray:
    return case.rng(*shape).normal(size=shape)


@requirement(
    "GMM-float64",
    "grouped_matmul and grouped_swiglu of float64 compute in float64, with the gradients of rows and weights.",
    port="rows",
    level=Level.OPTIONAL,
    capabilities=(Capability.GROUPED_MATMUL, Capability.AUTODIFF, _FLOAT64),
    needs=("GMM-empty-group", "SWIGLU-empty-group", "DTYPE-float64"),
)
def grouped(case: Case) -> None:
    platform, sizes, dim, hidden = case.platform, [3, 0, 4], 5, 6
    x, w1, w3 = _rows64(case, 7, dim), _rows64(case, 3, hidden, dim), _rows64(case, 3, hidden, dim, 1)[..., 0]
    w2, g, gh = _rows64(case, 3, dim, hidden), _rows64(case, 7, dim, 1)[..., 0], _rows64(case, 7, hidden)
    counts = case.tensor(np.array(sizes))
    out, (gx, gw) = case.gradients(lambda x, w: platform.grouped_matmul(x, w, counts), [x, w1], gh)
    stops = np.cumsum(sizes)
    want_w = np.stack([gh[b - n : b].T @ x[b - n : b] for n, b in zip(sizes, stops, strict=True)])
    product = {
        "output": (out, oracle.grouped_matmul(x, w1, sizes)),
        "gradient of the rows": (gx, oracle.grouped_matmul(gh, w1.transpose(0, 2, 1), sizes)),
        "gradient of the weight": (gw, want_w),
    }
    out, gradients = case.gradients(
        lambda x, w1, w2, w3: platform.grouped_swiglu(x, w1, w2, w3, counts), [x, w1, w2, w3], g
    )
    wanted = oracle.experts_gradients(x, w1, w2, w3, sizes, g)
    experts = {"output": (out, oracle.experts(x, w1, w2, w3, sizes))}
    for name, got, want in zip(("the rows", *_NAMES), gradients, wanted, strict=True):
        experts[f"gradient of {name}"] = (got, want)
    gate, up, gg = _rows64(case, 4, 3), _rows64(case, 4, 3, 1)[..., 0], _rows64(case, 4, 3, 2)[..., 0]
    out, (g_gate, g_up) = case.gradients(platform.swiglu, [gate, up], gg)
    s = 1 / (1 + np.exp(-gate))
    activation = {
        "output": (out, gate * s * up),
        "gradient of the gate": (g_gate, gg * up * s * (1 + gate * (1 - s))),
        "gradient of the other factor": (g_up, gg * gate * s),
    }
    for member, found in (("grouped_matmul", product), ("grouped_swiglu", experts), ("swiglu", activation)):
        for what, (got, want) in found.items():
            case.is_true(got.dtype == np.float64, f"{what} of {member}: dtype {got.dtype}, must be float64")
            case.close(got, want, f"{what} of {member}", _TOLERANCE)


# ------------------------------------------------------------------------------------------------------------ styles
@requirement(
    "STYLES-float64",
    "ExpertParallel and TensorParallel over experts in float64 equal the unsharded ones to 12 digits, in output and "
    "all gradients.",
    port="styles",
    level=Level.OPTIONAL,
    capabilities=(
        *(Capability.MODULES, Capability.SHARDED_PARAMETERS, Capability.GROUPED_MATMUL, Capability.PERMUTE_ROWS),
        *(Capability.AUTODIFF, Capability.ALL_TO_ALL, Capability.ALL_REDUCE, _FLOAT64),
    ),
    needs=("EP-random", "TP-parity", "GMM-float64", "SHARD-bits", "A2A-grad-bits", "TP-pair-bits"),
)
def styles(case: Case) -> None:
    platform, dim, hidden = case.platform, 5, case.divisible(8)
    make, _ = ROUTINGS["random"]
    for style, name, data_ranks in (
        (hyperep.ExpertParallel(), "ep", case.ranks),
        (hyperep.TensorParallel(), "tp", 1),
    ):
        counts = make(case.rng(77), data_ranks, 2 * data_ranks)
        experts, me = counts.shape[1], case.rank if data_ranks > 1 else 0
        case.note(style=type(style).__name__, tokens_per_expert=counts.tolist())
        shapes = ((experts, hidden, dim), (experts, dim, hidden), (experts, hidden, dim))
        w1, w2, w3 = weights = [case.rng(10, n).normal(size=shape) / 2 for n, shape in enumerate(shapes)]
        rows, cotangents = (
            [case.rng(20, n, r).normal(size=(count, dim)) for r, count in enumerate(counts.sum(axis=1))] for n in (0, 1)
        )

        def forward(m: Any, x: Any, *routing: Any, rows: int | None = None, experts: int = experts) -> Any:
            return experts_forward(platform, experts, m, x, *routing, rows=rows)

        module = platform.make_module(
            "Experts", {n: case.tensor(w) for n, w in zip(_NAMES, weights, strict=True)}, forward
        )
        module.takes = TAKES
        style.apply(module, case.mesh((case.ranks,), (name,)))
        tokens, handles = case.tensor(counts[me]), platform.parameters(module)
        out, (gx, *gw) = case.gradients(
            lambda x, module=module, tokens=tokens: module(x, tokens),
            [rows[me]],
            cotangents[me],
            [handles[n] for n in _NAMES],
        )
        every = [
            oracle.experts_gradients(x, w1, w2, w3, sizes, g)
            for x, sizes, g in zip(rows, counts.tolist(), cotangents, strict=True)
        ]
        case.close(out, oracle.experts(rows[me], w1, w2, w3, counts[me].tolist()), "output", _TOLERANCE)
        case.close(gx, every[me][0], "gradient of the input", _TOLERANCE)
        for n, (key, got) in enumerate(zip(_NAMES, gw, strict=True)):
            total = np.sum([gradients[1 + n] for gradients in every], axis=0)
            part = platform.sharding(handles[key]).local_slices(total.shape)
            case.close(got, total[part], f"gradient of this rank's part of {key}", _TOLERANCE)
