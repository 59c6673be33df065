# SPDX-License-Identifier: Apache-2.0
"""Initial weights: modules differ by default, and are the same wherever they are made. Runs on every platform."""

import numpy as np

from hyperep.loopback import LoopbackPlatform
from hyperep.moe import FeedForward, GroupedExperts, Linear, MoE, TopKRouter

MAKERS = {
    "MoE": lambda p, **seed: MoE(p, 8, 4, 4, 2, **seed),
    "TopKRouter": lambda p, **seed: TopKRouter(p, 8, 4, 2, **seed),
    "GroupedExperts": lambda p, **seed: GroupedExperts(p, 8, 4, 4, **seed),
    "FeedForward": lambda p, **seed: FeedForward(p, 8, 4, **seed),
    "Linear": lambda p, **seed: Linear(p, 8, 4, **seed),
}


def weights(platform, module):
    """Every parameter by path, as NumPy arrays."""
    parameters = platform.parameters(module)
    values = platform.to_host(*(platform.local(parameter) for parameter in parameters.values()))
    return dict(zip(parameters, values, strict=True))


def alike(one, other):
    """Whether two modules have any weight in common, and whether they have all."""
    assert one.keys() == other.keys()
    common = [path for path in one if np.array_equal(one[path], other[path])]
    return bool(common), len(common) == len(one)


def modules_differ_by_default(platform):
    """No two of a kind share a weight, and a seed that is given makes no difference to those without one."""
    for name, make in MAKERS.items():
        first = make(platform)
        make(platform, seed=3)
        second = make(platform)
        assert alike(weights(platform, first), weights(platform, second)) == (False, False), name


def model_by_default(platform):
    """What a program that gives no seed gets, as NumPy arrays."""
    return [weights(platform, make(platform)) for make in MAKERS.values() for _ in range(2)]


def a_model_is_the_same_here_as_on_loopback(fresh_platform):
    """A platform that has made nothing yet gives the same weights as any other one."""
    for here, there in zip(model_by_default(fresh_platform), model_by_default(LoopbackPlatform()), strict=True):
        assert alike(here, there) == (True, True)
