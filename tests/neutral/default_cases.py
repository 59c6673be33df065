# SPDX-License-Identifier: Apache-2.0
"""The members that ``PlatformBase`` builds from others, as they are where a platform overrides them too.

Each is taken with integers and booleans, with no rows, with views, and in groups whose ranks are not their places.
"""

import inspect

import numpy as np
import pytest
from measure import relative, replaced, rows

from hyperep.platform.base import PlatformBase
from hyperep.platform.errors import UnsupportedCapability

BUILT = [
    name
    for name, member in vars(PlatformBase).items()
    if inspect.isfunction(member) and name.strip("_") == name and not getattr(member, "__isabstractmethod__", False)
]
"""Names of the members with a default."""

DTYPES = (np.float32, np.int32, np.int64, np.bool_)


def by_default(platform):
    """The same rank of the same world, with the base class's members in place of the platform's own."""
    plain = type("ByDefault", (type(platform),), {name: vars(PlatformBase)[name] for name in BUILT})
    made = object.__new__(plain)
    made.__dict__.update(platform.__dict__)
    return made


def both(platform):
    """The platform as it is, and with the defaults."""
    return platform, by_default(platform)


def _data(seed, dtype, *shape):
    """Values of which no two ranks have the same."""
    values = 40 * rows(seed, *shape)
    return values > 0 if dtype == np.bool_ else values.astype(dtype)


def _view(platform, array):
    """A tensor of these values whose rows are columns in memory."""
    xp = platform.xp
    return xp.permute_dims(platform.from_host(np.ascontiguousarray(array.T)), (1, 0))


def _same(platform, tensor, expected):
    """Values, dtype and shape."""
    (found,) = platform.to_host(tensor)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), (found.dtype, expected.dtype)
    assert np.array_equal(found, expected), (found, expected)


def _pairs(platform):
    """This rank's group in a world of four, ``{0, 2}`` or ``{1, 3}``, and the world ranks in it."""
    groups = [(ranks, platform.new_group(list(ranks))) for ranks in ((0, 2), (1, 3))]
    ((ranks, group),) = [(ranks, group) for ranks, group in groups if platform.rank in ranks]
    return ranks, group


def every_default_is_tested(_platform):
    """A default that is new is to get its case here."""
    assert set(BUILT) == {
        *(
            "arange",
            "barrier",
            "stop_gradient",
            "from_local",
            "adopt_mesh",
            "functional_call",
            "reduce_scatter",
            "permute_rows",
            "sum_rows",
        ),
        *("grouped_matmul", "swiglu", "grouped_swiglu", "differentiable_all_to_all_single"),
        *("copy_to_group", "reduce_from_group"),
    }


def refusals(platform):
    """What cannot be built from other members is refused, by the capability that it belongs to."""
    with pytest.raises(UnsupportedCapability, match="functional_call"):
        by_default(platform).functional_call(object(), {}, len, [])


def numbers(platform):
    """arange is int64 unless it is told, and may be empty."""
    for p in both(platform):
        _same(platform, p.arange(3), np.arange(3))
        _same(platform, p.arange(2, 9, 3), np.array([2, 5, 8]))
        _same(platform, p.arange(0), np.zeros(0, np.int64))
        _same(platform, p.arange(4, dtype=platform.xp.int32), np.arange(4, dtype=np.int32))


def identities(platform):
    """stop_gradient and copy_to_group return every bit of what they are given, in its dtype; so do permuted rows."""
    index = np.array([2, 0, 1])
    for p in both(platform):
        for dtype in DTYPES:
            for shape in ((3, 4), (0, 4)):
                x = _data(platform.rank, dtype, *shape)
                order = index[: shape[0]]
                inverse = platform.from_host(np.argsort(order))
                for tensor in (platform.from_host(x), _view(platform, x)):
                    _same(platform, p.stop_gradient(tensor), x)
                    _same(platform, p.copy_to_group(tensor), x)
                    _same(platform, p.permute_rows(tensor, platform.from_host(order), inverse), x[order])
            scalar = np.asarray(_data(platform.rank, dtype))
            _same(platform, p.stop_gradient(platform.from_host(scalar)), scalar)
        zero = platform.from_host(np.array([-0.0], np.float32))
        for tensor in (p.stop_gradient(zero), p.copy_to_group(zero)):
            assert np.signbit(platform.to_host(tensor)[0]).all(), "the sign of a zero"


def in_groups(platform):
    """Sums, parts and exchanges of a group of two among four ranks: forward, backward, in the dtype that came."""
    ranks, group = _pairs(platform)
    me = ranks.index(platform.rank)
    for p in both(platform):
        _sums(platform, p, ranks, me, group)
        _exchanges(platform, p, ranks, me, group)


def _sums(platform, p, ranks, me, group):
    for dtype in (np.float32, np.int32, np.int64):
        for count in (4, 0):
            everyone = [_data(10 + rank, dtype, count, 3) for rank in ranks]
            total = everyone[0] + everyone[1]
            half = slice(me * count // 2, (me + 1) * count // 2)
            for tensor in (platform.from_host(everyone[me]), _view(platform, everyone[me])):
                _same(platform, p.reduce_scatter(tensor, group), total[half])
                _same(platform, p.reduce_from_group(tensor, group), total)
    g = [_data(50 + rank, np.float32, 2, 3) for rank in ranks]
    _pulled_back(platform, lambda x: p.copy_to_group(x, group), g[me], g[0] + g[1])
    _pulled_back(platform, lambda x: p.reduce_from_group(x, group), g[me], g[me])


def _exchanges(platform, p, ranks, me, group):
    # The first of the group sends one row to itself and two to the other, which sends it none, and itself one.
    sends = [[1, 2], [0, 1]]
    received = [[sends[i][j] for i in range(2)] for j in range(2)]

    def exchange(x):
        return p.differentiable_all_to_all_single(x, sends[me], received[me], group)

    for dtype in DTYPES:
        everyone = [_data(20 + rank, dtype, sum(sends[i]), 3) for i, rank in enumerate(ranks)]
        parts = [x[: sends[i][0]] if me == 0 else x[sends[i][0] :] for i, x in enumerate(everyone)]
        _same(platform, exchange(_view(platform, everyone[me])), np.concatenate(parts))
    # What was received comes back to where it was sent from.
    g = [_data(40 + rank, np.float32, sum(received[j]), 3) for j, rank in enumerate(ranks)]
    back = [g[j][: sends[0][j]] if me == 0 else g[j][sends[0][j] :] for j in range(2)]
    _pulled_back(platform, exchange, g[me], np.concatenate(back))


def _pulled_back(platform, function, cotangent, expected):
    """The gradient of *function*, for a cotangent that is a view; *expected* has the shape of its argument."""
    _, pullback = platform.vjp(function, platform.from_host(_data(30 + platform.rank, np.float32, *expected.shape)))
    _same(platform, pullback(_view(platform, cotangent))[0], expected)


def barriers(platform):
    """A barrier of a group is that group's alone, and waits for what it has started."""
    plain = by_default(platform)
    _, group = _pairs(platform)
    seen = []
    reduce = plain.all_reduce

    def noting(x, group=None, op="sum"):
        seen.append(group)
        return reduce(x, group, op)

    with replaced(plain, all_reduce=noting):
        if platform.rank in (0, 2):  # the other group does not take part
            plain.barrier(group)
            platform.barrier(group)
            assert seen == [group]
    platform.barrier()


def half_precision(platform):
    """Sixteen terms of which float16 would lose half, in groups of two where there are four ranks."""
    ranks = range(platform.world_size)
    x = np.full((platform.world_size, 3), 2048.0 if platform.rank == 0 else 1.0, np.float16)
    total = by_default(platform).reduce_scatter(platform.from_host(x))
    _same(platform, total, np.full((1, 3), 2048 + len(ranks) - 1, np.float16))


def sums_of_rows(platform):
    """Integers beyond 2**24 are summed exactly, views are taken, and no rows are none."""
    index = np.array([[1, 3], [2, 0]])
    inverse = np.argsort(index.reshape(-1))
    numbers = (2**25 + np.arange(12)).reshape(4, 3).astype(np.int32)
    x, w, g = rows(1, 4, 3), rows(2, 2, 2), rows(3, 2, 3)
    for p in both(platform):
        at = platform.from_host(index), platform.from_host(inverse)
        _same(platform, p.sum_rows(_view(platform, numbers), *at), numbers[index].sum(axis=1).astype(np.int32))

        def function(x, w, p=p, at=at):
            return p.sum_rows(x, *at, w)

        out, pullback = platform.vjp(function, _view(platform, x), platform.from_host(w))
        found = platform.to_host(out, *pullback(_view(platform, g)))
        grad_x = np.zeros_like(x)
        for t, k in np.ndindex(index.shape):
            grad_x[index[t, k]] = w[t, k] * g[t]
        wanted = (w[:, :, None] * x[index]).sum(axis=1), grad_x, (x[index] * g[:, None]).sum(axis=2)
        for value, right in zip(found, wanted, strict=True):
            assert relative(value, right) < 1e-6
        none = platform.from_host(np.zeros((0, 2), np.int64)), platform.from_host(np.zeros(0, np.int64))
        _same(platform, p.sum_rows(platform.from_host(numbers[:0]), *none), numbers[:0])


def products(platform):
    """Runs of rows, one of them empty, from views and with int32 sizes; sizes that do not fit are told."""
    sizes, dim, hidden = [2, 0, 3], 4, 6
    x, g = rows(1, 5, dim), rows(4, 5, dim)
    weights = [0.5 * rows(5 + i, 3, *shape) for i, shape in enumerate([(hidden, dim), (dim, hidden), (hidden, dim)])]
    runs = np.split(np.arange(5), np.cumsum(sizes)[:-1])

    def expert(e):
        w1, w2, w3 = (w[e].astype(float) for w in weights)
        a, b = x[runs[e]] @ w1.T, x[runs[e]] @ w3.T
        return (a / (1 + np.exp(-a)) * b) @ w2.T

    wanted = np.concatenate([expert(e) for e in range(3)])
    found = []
    for p in both(platform):
        for dtype in (np.int32, np.int64):
            counts = platform.from_host(np.array(sizes, dtype))
            out, pullback = platform.vjp(
                lambda x, *w, p=p, counts=counts: p.grouped_swiglu(x, *w, counts),
                _view(platform, x),
                *map(platform.from_host, weights),
            )
            found.append(platform.to_host(out, *pullback(_view(platform, g))))
            product = p.grouped_matmul(_view(platform, x), platform.from_host(weights[0]), counts)
            expected = np.concatenate([x[run] @ weights[0][e].T for e, run in enumerate(runs)])
            assert relative(platform.to_host(product)[0], expected) < 1e-5
        none = platform.from_host(np.zeros(3, np.int64))
        empty = p.grouped_swiglu(platform.from_host(x[:0]), *map(platform.from_host, weights), none)
        _same(platform, empty, x[:0])
    for value in found:
        assert relative(value[0], wanted) < 1e-5
        for one, other in zip(value, found[0], strict=True):
            assert relative(one, other) < 1e-5
    plain = by_default(platform)
    for wrong in ([2, 0, 2], [2, 0, 4], [5, 0, 5]):
        with pytest.raises(ValueError, match=r"must sum to the 5 rows"):
            plain.grouped_matmul(
                platform.from_host(x), platform.from_host(weights[0]), platform.from_host(np.array(wrong))
            )
