# SPDX-License-Identifier: Apache-2.0
"""Layers whose tokens travel in chunks, beside the same layers without: what a schedule must not change."""

import numpy as np
import pytest
from measure import fill_weights, relative, replaced
from token_cases import DIM, EXPERTS, HIDDEN, TOP_K, routing

import hyperep
from hyperep.moe import GroupedExperts, Linear

TOLERANCE = 2e-5


def _experts(platform, chunks, seed=3):
    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",))
    experts = GroupedExperts(platform, DIM, HIDDEN, EXPERTS, seed=seed)
    fill_weights(platform, experts)
    return hyperep.ExpertParallel(chunks=chunks).apply(experts, mesh)


def _data(platform, tokens=None):
    x, indices, weights, cotangent = routing(platform.rank, tokens=tokens)
    return [platform.from_host(v) for v in (x.astype(np.float32), indices, weights.astype(np.float32))] + [
        platform.from_host(cotangent.astype(np.float32))
    ]


def _same(platform, found, wanted):
    for number, (one, other) in enumerate(zip(platform.to_host(*found), platform.to_host(*wanted), strict=True)):
        error = relative(one, other) if other.any() else float(abs(one).max(initial=0))
        assert error < TOLERANCE, (number, error)


def two_layers_interleaved(platform):
    """Two layers, one called twice and its backwards in another order than its forwards; gradients of all."""
    found = []
    for chunks in (1, 3):
        first, second = _experts(platform, chunks), _experts(platform, chunks, seed=4)
        x, numbers, s, g = _data(platform)
        handles = [*platform.parameters(first).values(), *platform.parameters(second).values()]

        def both(x, s, first=first, second=second, numbers=numbers):
            return second(first(x, numbers, s), numbers, s) + first(x * 2, numbers, s)

        one, pull_one = platform.vjp(both, x, s, parameters=handles)
        other, pull_other = platform.vjp(both, x + 1, s, parameters=handles)
        found.append([one, other, *pull_one(g), *pull_other(g * 3)])
    _same(platform, *found)


def gradients_that_nobody_wants(platform):
    """Only weights of choices are differentiated on one rank, only tokens on another, and parameters on none."""
    found = []
    for chunks in (1, 2):
        experts = _experts(platform, chunks)
        x, numbers, s, g = _data(platform)
        if platform.rank == 0:
            out, pull = platform.vjp(lambda s, e=experts, x=x, n=numbers: e(x, n, s), s)
        else:
            out, pull = platform.vjp(lambda x, e=experts, s=s, n=numbers: e(x, n, s), x)
        found.append([out, *pull(g)])
    _same(platform, *found)


def meanwhile_is_added(platform):
    """A module that is computed meanwhile, with gradients of its own parameters, and tokens' through both."""
    found = []
    for chunks in (1, 3):
        experts = _experts(platform, chunks)
        beside = Linear(platform, DIM, DIM, bias=True, seed=7)
        fill_weights(platform, beside)
        x, numbers, s, g = _data(platform)
        handles = [*platform.parameters(beside).values(), *platform.parameters(experts).values()]

        def both(x, s, experts=experts, beside=beside, numbers=numbers, chunks=chunks):
            if chunks == 1:
                return experts(x, numbers, s) + beside(x)
            return experts(x, numbers, s, meanwhile=beside)

        out, pull = platform.vjp(both, x, s, parameters=handles)
        found.append([out, *pull(g)])
    _same(platform, *found)


def no_more_than_two_parts_are_in_flight(platform):
    """Exchanges of at most two of four parts are issued and not waited for, in forward and in backward."""
    experts = _experts(platform, 4)
    x, numbers, s, g = _data(platform, tokens=16)
    flying, most = [0], [0]
    original = platform.all_to_all_single

    class Counted:
        def __init__(self, work):
            self.work = work

        def wait(self):
            flying[0] -= 1
            return self.work.wait()

    def counting(x, output_splits=None, input_splits=None, group=None, async_op=False):
        work = original(x, output_splits, input_splits, group, async_op)
        if not async_op:
            return work
        flying[0] += 1
        most[0] = max(most[0], flying[0])
        return Counted(work)

    with replaced(platform, all_to_all_single=counting):
        _, pull = platform.vjp(lambda x, s: experts(x, numbers, s), x, s)
        # Two exchanges a part: of tokens, and of choices.
        assert (flying[0], most[0]) == (0, 4)
        most[0] = 0
        pull(g)
        assert flying[0] == 0
        assert 2 < most[0] <= 4


def refusals(platform):
    """What cannot be cut in chunks is refused by name, before anything is sent."""
    experts = GroupedExperts(platform, DIM, HIDDEN, EXPERTS)
    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",))
    for chunks in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="whole number, 1 or more"):
            hyperep.ExpertParallel(chunks=chunks)
    with pytest.raises(ValueError, match="rows travel in one part"):
        hyperep.ExpertParallel(chunks=2, exchange="rows")
    if platform.world_size > 1:
        with pytest.raises(ValueError, match="chunks=2"):
            hyperep.ExpertParallel(chunks=2 if platform.rank else 3).apply(experts, mesh)
    hyperep.ExpertParallel(chunks=2).apply(experts, mesh)
    x, numbers, s, _ = _data(platform, tokens=4)
    with pytest.raises(ValueError, match=r"called with the tensors \['scale'\]"):
        experts(x, numbers, s, scale=x)
    assert tuple(experts(x, numbers, s).shape) == (4, DIM)
    assert numbers.shape[1] == TOP_K


CASES = (
    two_layers_interleaved,
    gradients_that_nobody_wants,
    meanwhile_is_added,
    no_more_than_two_parts_are_in_flight,
    refusals,
)
"""Of every platform, at two ranks or more."""
