# SPDX-License-Identifier: Apache-2.0
"""Row permutation, grouped products and the experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hyperep.conformance import oracle
from hyperep.conformance.case import Case
from hyperep.conformance.requirement import Level, requirement
from hyperep.platform.capabilities import Capability

PORT = "rows"
_PERMUTE = (Capability.PERMUTE_ROWS,)
_PERMUTE_GRAD = (Capability.PERMUTE_ROWS, Capability.AUTODIFF)
_TOLERANCE = 1e-4
"""Of the experts, relative; frameworks have an exponential of their own."""
_GROUPED = (Capability.GROUPED_MATMUL,)
_GROUPED_GRAD = (Capability.GROUPED_MATMUL, Capability.AUTODIFF)


def _permutation(case: Case, rows: int) -> tuple[np.ndarray, Any, Any]:
    order = case.rng(rows, 9).permutation(rows)
    return order, case.tensor(order), case.tensor(np.argsort(order))


@requirement(
    "PERM-values",
    "permute_rows(x, index, inverse) is x[index] for rows of one to three dims, floats and integers.",
    port=PORT,
    capabilities=_PERMUTE,
    needs=("HOST-roundtrip",),
)
def permute_values(case: Case) -> None:
    order, index, inverse = _permutation(case, 7)
    for x in (case.normal((7, 3), 1), np.arange(7), np.arange(42, dtype=np.int32).reshape(7, 2, 3)):
        case.note(shape=x.shape, dtype=str(x.dtype))
        case.equal(case.platform.permute_rows(case.tensor(x), index, inverse), x[order], "permuted rows")


@requirement(
    "PERM-roundtrip",
    "Permuting by index and then by inverse gives the rows back.",
    port=PORT,
    capabilities=_PERMUTE,
    needs=("PERM-values",),
)
def permute_roundtrip(case: Case) -> None:
    x = case.normal((9, 2), 1)
    _, index, inverse = _permutation(case, 9)
    there = case.platform.permute_rows(case.tensor(x), index, inverse)
    case.equal(case.platform.permute_rows(there, inverse, index), x, "rows after both ways")


@requirement(
    "PERM-empty",
    "permute_rows of zero rows keeps the other dims, and its gradient has zero rows.",
    port=PORT,
    capabilities=_PERMUTE_GRAD,
    needs=("PERM-values", "VJP-gradients"),
)
def permute_empty(case: Case) -> None:
    none = case.tensor(np.zeros(0, np.int64))
    x = np.zeros((0, 3), np.float32)
    out, (gradient,) = case.gradients(lambda x: case.platform.permute_rows(x, none, none), [x], x)
    case.equal(out, x, "output")
    case.equal(gradient, x, "gradient")


@requirement(
    "PERM-grad",
    "The backward of permute_rows is the gather by inverse.",
    port=PORT,
    capabilities=_PERMUTE_GRAD,
    needs=("PERM-values", "VJP-gradients"),
)
def permute_gradient(case: Case) -> None:
    order, index, inverse = _permutation(case, 8)
    x, g = case.normal((8, 3), 1), case.normal((8, 3), 2)
    _, (gradient,) = case.gradients(lambda x: case.platform.permute_rows(x, index, inverse), [x], g)
    case.equal(gradient, g[np.argsort(order)], "gradient")


@requirement(
    "PERM-grad-strided-cotangent",
    "The backward of permute_rows takes transposed and expanded cotangents.",
    port=PORT,
    capabilities=_PERMUTE_GRAD,
    needs=("PERM-grad",),
)
def permute_strided_cotangent(case: Case) -> None:
    order, index, inverse = _permutation(case, 6)
    x, g = case.normal((6, 3), 1), case.normal((3, 6), 2)
    xp = case.xp
    _, (gradient,) = case.gradients(
        lambda x: xp.permute_dims(case.platform.permute_rows(x, index, inverse), (1, 0)), [x], g
    )
    case.equal(gradient, g.T[np.argsort(order)], "gradient of a transposed result")
    _, (gradient,) = case.gradients(
        lambda x: xp.sum(case.platform.permute_rows(x, index, inverse)), [x], np.array(2, np.float32)
    )
    case.equal(gradient, np.full((6, 3), 2, np.float32), "gradient of a sum")


@requirement(
    "PERM-many-rows",
    "permute_rows is exact past 2**24 rows, where an index cast to float32 is not.",
    port=PORT,
    level=Level.STRESS,
    capabilities=_PERMUTE,
    needs=("PERM-roundtrip",),
)
def permute_many_rows(case: Case) -> None:
    if case.rank:
        return  # a local matter; the memory of one rank is enough
    rows = 2**24 + 5
    # Only the last rows change places: a rounded index would take a neighbour.
    order = np.arange(rows)
    order[-4:] = order[-4:][::-1].copy()
    index = case.tensor(order)
    out = case.platform.permute_rows(case.platform.arange(rows, dtype=case.xp.int32), index, index)
    case.equal(out[-6:], order[-6:].astype(np.int32), "the last rows")


def _sum_rows_agrees(case: Case, tokens: int, top_k: int, weighted: bool) -> None:
    case.note(tokens=tokens, top_k=top_k, weighted=weighted)
    order = case.rng(tokens, top_k).permutation(tokens * top_k)
    x, g = case.normal((tokens * top_k, 3), 1), case.normal((tokens, 3), 2)
    w = case.normal((tokens, top_k), 3) if weighted else np.ones((tokens, top_k), np.float32)
    index, inverse = case.tensor(order.reshape(tokens, top_k)), case.tensor(np.argsort(order))

    def function(x: Any, *weights: Any) -> Any:
        return case.platform.sum_rows(x, index, inverse, *weights)

    out, gradients = case.gradients(function, [x, w] if weighted else [x], g)
    picked = x[order].reshape(tokens, top_k, 3)
    case.close(out, (picked * w[..., None]).sum(axis=1), "output")
    spread = (w[..., None] * g[:, None]).reshape(tokens * top_k, 3)
    case.close(gradients[0], spread[np.argsort(order)], "gradient of the rows")
    if weighted:
        case.close(gradients[1], (picked * g[:, None]).sum(axis=2), "gradient of the weights")


@requirement(
    "SUM-rows",
    "sum_rows adds up the K rows of each token, weighted or not, with the gradients of rows and weights.",
    port=PORT,
    capabilities=_PERMUTE_GRAD,
    needs=("PERM-grad",),
)
def sum_rows(case: Case) -> None:
    for tokens, top_k in ((5, 2), (4, 1), (3, 3)):
        for weighted in (True, False):
            _sum_rows_agrees(case, tokens, top_k, weighted)


@requirement(
    "SUM-rows-empty",
    "sum_rows of zero tokens gives zero rows, and gradients of the inputs' shapes.",
    port=PORT,
    capabilities=_PERMUTE_GRAD,
    needs=("SUM-rows",),
)
def sum_rows_empty(case: Case) -> None:
    for weighted in (True, False):
        _sum_rows_agrees(case, 0, 2, weighted)


@requirement(
    "SUM-rows-no-row",
    "An index of N or more is a term without a row: it adds nothing, whatever its weight, NaN included, and its weight "
    "gets the gradient zero; also where no term of a token has a row, and where there is no row at all.",
    port=PORT,
    capabilities=_PERMUTE_GRAD,
    needs=("SUM-rows",),
)
def sum_rows_no_row(case: Case) -> None:
    for tokens, top_k, rows in ((6, 3, 7), (4, 2, 1), (5, 1, 3), (3, 2, 0)):
        for weighted, dtype in ((True, np.float32), (False, np.float32), (False, np.int64)):
            case.note(tokens=tokens, top_k=top_k, rows=rows, weighted=weighted, dtype=np.dtype(dtype).name)
            inverse = case.rng(tokens, rows).permutation((tokens - 1) * top_k)[:rows]  # nothing for the last token
            index = rows + case.rng(tokens, rows, 1).integers(0, 1000, size=tokens * top_k)
            index[::2] = rows
            index[inverse] = np.arange(rows)
            named = np.zeros(tokens * top_k, bool)
            named[inverse] = True
            x, g = ((10 * case.normal((n, 3), m)).astype(dtype) for m, n in enumerate((rows, tokens)))
            if dtype is np.int64:
                x = x + 2**40  # which floats of 32 bits round
            w = np.where(named, case.normal((tokens * top_k,), 2), np.float32(np.nan)) if weighted else 1.0 * named
            terms = np.zeros((tokens * top_k, 3), np.float64)
            terms[inverse] = x
            told = case.tensor(index.reshape(tokens, top_k)), case.tensor(inverse)
            sums = (terms * np.where(named, w, 0)[:, None]).reshape(tokens, top_k, 3).sum(axis=1)
            if dtype is np.int64:
                case.equal(case.platform.sum_rows(case.tensor(x), *told), sums.astype(dtype), "sums of integers")
                continue
            primals = [x, w.reshape(tokens, top_k)] if weighted else [x]
            out, gradients = case.gradients(lambda x, *w, told=told: case.platform.sum_rows(x, *told, *w), primals, g)
            case.close(out, sums, "output")
            spread = np.repeat(g, top_k, axis=0)
            case.close(gradients[0], (w[:, None] * spread)[inverse], "gradient of the rows")
            if weighted:
                dots = np.where(named, (terms * spread).sum(axis=1), 0)
                case.close(gradients[1], dots.reshape(tokens, top_k), "gradient of the weights")


@requirement(
    "SUM-rows-strided",
    "Rows, index, weights and cotangents of sum_rows may be transposed views, and a cotangent an expanded one.",
    port=PORT,
    capabilities=_PERMUTE_GRAD,
    needs=("SUM-rows-no-row",),
)
def sum_rows_strided(case: Case) -> None:
    tokens, top_k, rows, xp = 4, 3, 9, case.xp
    inverse = case.rng(1).permutation(tokens * top_k)[:rows]
    index = np.full(tokens * top_k, rows)
    index[inverse] = np.arange(rows)
    numbers = xp.permute_dims(case.tensor(np.ascontiguousarray(index.reshape(tokens, top_k).T)), (1, 0))
    x, w, g = (case.normal(shape, n) for n, shape in enumerate(((3, rows), (top_k, tokens), (3, tokens))))
    where = case.tensor(inverse)

    def sums(*given: Any) -> Any:
        x, *w = (xp.permute_dims(of, (1, 0)) for of in given)
        return xp.permute_dims(case.platform.sum_rows(x, numbers, where, *w), (1, 0))

    for weighted in (True, False):
        case.note(weighted=weighted)
        weights = np.where(index < rows, w.T.ravel() if weighted else 1, 0)[:, None].astype(np.float32)
        terms = np.zeros((tokens * top_k, 3), np.float32)
        terms[inverse] = x.T
        primals = [x, w] if weighted else [x]
        out, gradients = case.gradients(sums, primals, g)
        case.close(out.T, (weights * terms).reshape(tokens, top_k, 3).sum(axis=1), "sums")
        spread = np.repeat(g.T, top_k, axis=0)
        case.close(gradients[0].T, (weights * spread)[inverse], "gradient of the rows")
        # The cotangent of a sum is one number, seen in every place.
        _, of_sum = case.gradients(lambda *given: xp.sum(sums(*given)), primals, np.array(2, np.float32))
        case.close(of_sum[0].T, np.repeat(2 * weights[inverse], 3, axis=1), "gradient of the rows of a sum")
        if weighted:
            for what, got, of in (("weights", gradients[1], spread), ("weights of a sum", of_sum[1], 2)):
                want = (terms * of).sum(axis=1).reshape(tokens, top_k)
                case.close(got.T, want, f"gradient of the {what}")


@requirement(
    "SUM-rows-float64",
    "sum_rows in float64 loses nothing: rows, weights, sums and both gradients.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(*_PERMUTE_GRAD, Capability.FLOAT64),
    needs=("SUM-rows-no-row",),
)
def sum_rows_float64(case: Case) -> None:
    # The third term has no row. What float32 would round away is all that is left of the two others.
    fine = 2.0**-40
    x, w = np.array([[1 + fine, 3], [-1, -3]]), np.array([[1, 1, 5.0]])
    index, inverse = case.tensor(np.array([[0, 1, 2]])), case.tensor(np.arange(2))
    one = np.ones((1, 2))
    out, (grad_x, grad_w) = case.gradients(
        lambda x, w: case.platform.sum_rows(x, index, inverse, w), [x, w], one + fine
    )
    case.equal(out, np.array([[fine, 0]]), "sums")
    case.equal(grad_x, np.ones((2, 2)) + fine, "gradient of the rows")
    case.equal(grad_w, np.array([[(x[0] * (1 + fine)).sum(), (x[1] * (1 + fine)).sum(), 0]]), "gradient of the weights")
    coarse = case.tensor(np.array([[1.0, 3], [-1, -3]]))
    out, _ = case.gradients(
        lambda w: case.platform.sum_rows(coarse, index, inverse, w), [np.array([[1 + fine, 1, 5]])], one
    )
    case.equal(out, np.array([[fine, 3 * fine]]), "sums with fine weights")
    out, _ = case.gradients(lambda x: case.platform.sum_rows(x, index, inverse), [x], one)
    case.equal(out, np.array([[fine, 0]]), "sums without weights")


@requirement(
    "SUM-rows-bfloat16",
    "sum_rows of bfloat16 rows adds in float32 at least: eight small terms beside a large one are not lost.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(Capability.PERMUTE_ROWS, Capability.BFLOAT16),
    needs=("SUM-rows", "DTYPE-bfloat16"),
)
def sum_rows_bfloat16(case: Case) -> None:
    # 256 + 1 is 256 in bfloat16, which a running sum in that dtype would never leave; in units past float16.
    unit = np.float32(2**20)
    x = unit * np.concatenate([np.full((1, 2), 256.0), np.ones((8, 2))]).astype(np.float32)
    index, inverse = case.tensor(np.arange(9).reshape(1, 9)), case.tensor(np.arange(9))
    out = case.platform.sum_rows(case.tensor(x, "bfloat16"), index, inverse)
    case.is_true(out.dtype == case.dtype("bfloat16"), f"the result has dtype {out.dtype}")
    case.equal(case.host(out), np.full((1, 2), 264 * unit, np.float32), "the sum")


@requirement(
    "SUM-rows-bfloat16-weights",
    "Weights of bfloat16 rows in sum_rows keep their own dtype, with their gradients: one in float32 is not rounded to "
    "bfloat16 before it multiplies.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(*_PERMUTE_GRAD, Capability.BFLOAT16),
    needs=("SUM-rows-bfloat16", "SUM-rows-no-row"),
)
def sum_rows_bfloat16_weights(case: Case) -> None:
    # The weights differ by a five hundredth, of which bfloat16 knows nothing; the third term has no row.
    w = np.array([[1 + 2**-9, 1, 5]], np.float32)
    x = np.array([[256, 512], [-256, -512]], np.float32)
    index, inverse = case.tensor(np.array([[0, 1, 2]])), case.tensor(np.arange(2))
    g = case.tensor(np.ones((1, 2), np.float32), "bfloat16")
    out, (grad_x, grad_w) = case.gradients(
        lambda x, w: case.platform.sum_rows(x, index, inverse, w), [case.tensor(x, "bfloat16"), case.tensor(w)], g
    )
    case.equal(out.astype(np.float32), np.array([[0.5, 1]], np.float32), "the sums")
    case.equal(grad_x.astype(np.float32), np.ones((2, 2), np.float32), "gradient of the rows")
    case.equal(grad_w, np.array([[768, -768, 0]], np.float32), "gradient of the weights")


def _group_data(case: Case, sizes: list[int], dim: int = 5, hidden: int = 7) -> tuple[np.ndarray, ...]:
    rows, groups = sum(sizes), len(sizes)
    return (
        case.normal((rows, dim), 1),
        case.normal((groups, hidden, dim), 2),
        case.normal((groups, dim, hidden), 3),
        case.normal((groups, hidden, dim), 4),
        case.normal((rows, dim), 5),
        case.normal((rows, hidden), 6),
    )


def _grouped_matmul_agrees(case: Case, sizes: list[int], dtype: type = np.int64) -> None:
    case.note(group_sizes=sizes)
    x, w, _, _, _, g = _group_data(case, sizes)
    counts = case.tensor(np.array(sizes, dtype))
    out, (gx, gw) = case.gradients(lambda x, w: case.platform.grouped_matmul(x, w, counts), [x, w], g)
    case.close(out, oracle.grouped_matmul(x, w, sizes), "output")
    transposed = np.ascontiguousarray(w.transpose(0, 2, 1))
    case.close(gx, oracle.grouped_matmul(g, transposed, sizes), "gradient of the rows")
    stops = np.cumsum(sizes)
    want = np.stack([g[b - n : b].T @ x[b - n : b] for n, b in zip(sizes, stops, strict=True)])
    case.close(gw, want, "gradient of the weight")


@requirement(
    "GMM-values",
    "grouped_matmul multiplies each run of rows by the transpose of its own matrix.",
    port=PORT,
    capabilities=_GROUPED,
    needs=("HOST-roundtrip",),
)
def grouped_values(case: Case) -> None:
    for sizes in ([3, 1, 4], [5], [2, 2, 2, 2]):
        case.note(group_sizes=sizes)
        x, w, *_ = _group_data(case, sizes)
        out = case.platform.grouped_matmul(case.tensor(x), case.tensor(w), case.tensor(np.array(sizes)))
        case.close(out, oracle.grouped_matmul(x, w, sizes), "output")


@requirement(
    "GMM-grad",
    "grouped_matmul has the gradients of its rows and of every matrix.",
    port=PORT,
    capabilities=_GROUPED_GRAD,
    needs=("GMM-values", "VJP-gradients"),
)
def grouped_gradient(case: Case) -> None:
    _grouped_matmul_agrees(case, [3, 1, 4])


@requirement(
    "GMM-empty-group",
    "A group without rows contributes nothing, wherever it stands, and gets a zero weight gradient.",
    port=PORT,
    capabilities=_GROUPED_GRAD,
    needs=("GMM-grad",),
)
def grouped_empty_group(case: Case) -> None:
    for sizes in ([0, 3, 2], [3, 0, 2], [3, 2, 0], [0, 0, 4], [4, 0, 0]):
        _grouped_matmul_agrees(case, sizes)


@requirement(
    "GMM-no-rows",
    "Zero rows in all give an output of zero rows and zero weight gradients of full size.",
    port=PORT,
    capabilities=_GROUPED_GRAD,
    needs=("GMM-grad",),
)
def grouped_no_rows(case: Case) -> None:
    _grouped_matmul_agrees(case, [0, 0, 0])


@requirement(
    "GMM-int32-sizes",
    "group_sizes may be int32.",
    port=PORT,
    capabilities=_GROUPED_GRAD,
    needs=("GMM-grad",),
)
def grouped_int32(case: Case) -> None:
    _grouped_matmul_agrees(case, [2, 0, 5], np.int32)


@requirement(
    "GMM-strided",
    "Rows, matrices and cotangents of grouped_matmul may be transposed views.",
    port=PORT,
    capabilities=_GROUPED_GRAD,
    needs=("GMM-grad",),
)
def grouped_strided(case: Case) -> None:
    sizes = [3, 2]
    x, w, _, _, _, g = _group_data(case, sizes)
    counts, xp = case.tensor(np.array(sizes)), case.xp

    def function(x: Any, w: Any) -> Any:
        product = case.platform.grouped_matmul(xp.permute_dims(x, (1, 0)), xp.permute_dims(w, (0, 2, 1)), counts)
        return xp.permute_dims(product, (1, 0))

    out, (gx, gw) = case.gradients(function, [x.T.copy(), w.transpose(0, 2, 1).copy()], g.T.copy())
    case.close(out, oracle.grouped_matmul(x, w, sizes).T, "output")
    case.close(gx, oracle.grouped_matmul(g, w.transpose(0, 2, 1), sizes).T, "gradient of the rows")
    want = np.stack([g[:3].T @ x[:3], g[3:].T @ x[3:]]).transpose(0, 2, 1)
    case.close(gw, want, "gradient of the matrices")


@requirement(
    "GMM-nan-stays",
    "A NaN in one group's rows reaches neither the output nor the weight gradient of another group.",
    port=PORT,
    capabilities=_GROUPED_GRAD,
    needs=("GMM-empty-group",),
)
def grouped_nan(case: Case) -> None:
    sizes = [2, 0, 3]
    x, w, _, _, _, g = _group_data(case, sizes)
    x[0, 0] = np.nan
    counts = case.tensor(np.array(sizes))
    out, (_, gw) = case.gradients(lambda x, w: case.platform.grouped_matmul(x, w, counts), [x, w], g)
    case.close(out[2:], x[2:] @ w[2].T, "output of the last group")
    case.close(gw[1], np.zeros_like(w[1]), "weight gradient of the empty group")
    case.close(gw[2], g[2:].T @ x[2:], "weight gradient of the last group")


@requirement(
    "GMM-bfloat16",
    "grouped_matmul, grouped_swiglu and swiglu work in bfloat16, with all gradients, and return it, also where values "
    "are past those of float16; and where the platform has float16, to its last digit.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(*_GROUPED_GRAD, Capability.BFLOAT16),
    needs=("GMM-grad", "SWIGLU-grad", "DTYPE-bfloat16"),
)
def grouped_bfloat16(case: Case) -> None:
    platform, sizes, dim, hidden = case.platform, [3, 0, 2], 8, 16
    counts, rows, large = case.tensor(np.array(sizes)), sum(sizes), np.float32(2**20)
    up, down = (3, hidden, dim), (3, dim, hidden)
    # Eighths, which bfloat16 holds.
    x, w1, w2, w3, g, gh = (
        case.rng(31, n).integers(-8, 9, size=shape).astype(np.float32) / 8
        for n, shape in enumerate(((rows, dim), up, down, up, (rows, dim), (rows, hidden)))
    )

    def agree(
        what: str, function: Callable[..., Any], primals: list[Any], g: Any, wanted: Sequence[np.ndarray]
    ) -> None:
        given = [case.tensor(a, "bfloat16") for a in primals]
        output, pullback = platform.vjp(function, *given)
        results = [output, *pullback(case.tensor(g, "bfloat16"))]
        for number, (got, want) in enumerate(zip(results, wanted, strict=True)):
            name = f"gradient {number} of {what}" if number else f"output of {what}"
            case.is_true(got.dtype == case.dtype("bfloat16"), f"{name} has dtype {got.dtype}")
            case.close(got, want, name, 4e-2)

    gradient_of_rows = oracle.grouped_matmul(large * gh, w1.transpose(0, 2, 1), sizes)
    stops = np.cumsum(sizes)
    gradient_of_weight = np.stack([large * gh[b - n : b].T @ x[b - n : b] for n, b in zip(sizes, stops, strict=True)])
    agree(
        "grouped_matmul",
        lambda x, w: platform.grouped_matmul(x, w, counts),
        [x, large * w1],
        large * gh,
        [large * oracle.grouped_matmul(x, w1, sizes), large * gradient_of_rows, gradient_of_weight],
    )
    agree(
        "grouped_swiglu",
        lambda *given: platform.grouped_swiglu(*given, counts),
        [x, w1, large * w2, w3],
        large * g,
        [
            oracle.experts(x, w1, large * w2, w3, sizes),
            *oracle.experts_gradients(x, w1, large * w2, w3, sizes, large * g),
        ],
    )
    gate, s = x, 1 / (1 + np.exp(-x))
    agree(
        "swiglu",
        platform.swiglu,
        [gate, large * g],
        large * g,
        [gate * s * large * g, (large * g) ** 2 * s * (1 + gate * (1 - s)), large * g * gate * s],
    )
    if not case.supports(Capability.FLOAT16):
        return
    # One number in each row and column, with all digits of float16; silu(16) is 16 there.
    exact = (1 + np.arange(1, 6) * 2.0**-10).astype(np.float16)
    one = np.eye(5, dtype=np.float16)
    diagonal, sixteen = np.diag(exact)[None], 16 * one[None]
    whole = case.tensor(np.array([5]))
    d, t, i = (case.tensor(a) for a in (diagonal, sixteen, one[None]))
    case.equal(platform.grouped_matmul(case.tensor(one), d, whole), diagonal[0], "grouped_matmul in float16")
    case.equal(platform.swiglu(t, d)[0], 16 * diagonal[0], "swiglu in float16")
    case.equal(platform.grouped_swiglu(case.tensor(one), t, i, d, whole), 16 * diagonal[0], "grouped_swiglu in float16")


@requirement(
    "SWIGLU-elementwise",
    "swiglu(gate, up) is silu(gate) * up with both gradients, also where exp(gate) overflows and without rows.",
    port=PORT,
    capabilities=(Capability.AUTODIFF,),
    needs=("CUSTOM-gradients", "XP-tanh"),
)
def swiglu_elementwise(case: Case) -> None:
    for shape, size in (((5, 4), 2), ((5, 4), 300), ((0, 4), 1)):
        gate, up, g = (case.normal(shape, n) for n in range(3))
        gate *= np.float32(size)
        with np.errstate(over="ignore"):
            s = 1 / (1 + np.exp(-gate.astype(np.float64)))
        out, (g_gate, g_up) = case.gradients(case.platform.swiglu, [gate, up], g)
        case.close(out, gate * s * up, "output", _TOLERANCE)
        case.close(g_gate, g * up * s * (1 + gate * (1 - s)), "gradient of the gate", _TOLERANCE)
        case.close(g_up, g * gate * s, "gradient of the other factor", _TOLERANCE)


def _experts_agree(case: Case, sizes: list[int]) -> None:
    case.note(group_sizes=sizes)
    x, w1, w2, w3, g, _ = _group_data(case, sizes)
    counts = case.tensor(np.array(sizes))
    out, gradients = case.gradients(
        lambda x, w1, w2, w3: case.platform.grouped_swiglu(x, w1, w2, w3, counts), [x, w1, w2, w3], g
    )
    case.close(out, oracle.experts(x, w1, w2, w3, sizes), "output", _TOLERANCE)
    wanted = oracle.experts_gradients(x, w1, w2, w3, sizes, g)
    for name, got, want in zip(("the rows", "w1", "w2", "w3"), gradients, wanted, strict=True):
        case.close(got, want, f"gradient of {name}", _TOLERANCE)


@requirement(
    "SWIGLU-grad",
    "grouped_swiglu is (silu(x w1^T) * (x w3^T)) w2^T for each group, with the gradients of rows and weights.",
    port=PORT,
    capabilities=_GROUPED_GRAD,
    needs=("GMM-grad", "SWIGLU-elementwise"),
)
def swiglu(case: Case) -> None:
    _experts_agree(case, [3, 1, 4])


@requirement(
    "SWIGLU-empty-group",
    "grouped_swiglu gives groups without rows zero weight gradients, also where no group has rows.",
    port=PORT,
    capabilities=_GROUPED_GRAD,
    needs=("SWIGLU-grad", "GMM-empty-group"),
)
def swiglu_empty(case: Case) -> None:
    for sizes in ([0, 3, 2], [3, 0, 0], [0, 0]):
        _experts_agree(case, sizes)
