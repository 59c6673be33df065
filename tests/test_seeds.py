# SPDX-License-Identifier: Apache-2.0
"""Initial weights on loopback."""

import numpy as np
import pytest
import seed_cases
from seed_cases import MAKERS, alike, model_by_default, weights

from hyperep.loopback import LoopbackPlatform, run
from hyperep.moe import MoE


def test_modules_differ_by_default():
    run(seed_cases.modules_differ_by_default, 1)


def test_they_are_the_same_on_all_ranks_and_at_all_degrees():
    (wanted,) = run(model_by_default, 1)
    for ranks in (2, 4):
        for found in run(model_by_default, ranks):
            for one, other in zip(found, wanted, strict=True):
                assert alike(one, other) == (True, True)


def test_stages_that_make_their_own_layers_say_which():
    """Two stages of a pipeline have between them what a rank that makes all four layers has."""

    def whole(platform):
        return [weights(platform, MoE(platform, 8, 4, 4, 2)) for _ in range(4)]

    def staged(platform):
        own = range(2 * platform.rank, 2 * platform.rank + 2)
        return [weights(platform, MoE(platform, 8, 4, 4, 2, seed=(0, layer))) for layer in own]

    (wanted,) = run(whole, 1)
    found = [layer for stage in run(staged, 2) for layer in stage]
    assert all(alike(one, other) == (True, True) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", MAKERS)
def test_one_seed_is_one_set_of_weights(name):
    platform = LoopbackPlatform()
    seeds = [7, 8, (7, 0), (7, 0, 0), (7, 1), (7, "layers.0"), (7, "layers.1"), (7, "layers.0", 0), (8, "layers.0")]
    made = [[weights(platform, MAKERS[name](platform, seed=seed)) for seed in seeds] for _ in range(2)]
    for i, one in enumerate(made[0]):
        for j, other in enumerate(made[1]):
            assert alike(one, other) == ((True, True) if i == j else (False, False)), (seeds[i], seeds[j])


def test_a_generator_decides_a_whole_model():
    platform = LoopbackPlatform()

    def model(seed):
        rng = np.random.default_rng(seed)
        return [weights(platform, MoE(platform, 8, 4, 4, 2, seed=rng)) for _ in range(2)]

    (first, second), (again, _), (other, _) = model(1), model(1), model(2)
    assert alike(first, again) == (True, True)
    assert alike(first, second) == alike(first, other) == (False, False)


@pytest.mark.parametrize("seed", [-1, 1.5, True, "layers.0", (), ("layers.0",), (1, -2), (1, 2.0), [1, 2]])
def test_what_is_no_seed_is_told(seed):
    with pytest.raises(TypeError, match=r"seed=.*: give an int from 0 on, a tuple"):
        MoE(LoopbackPlatform(), 8, 4, 4, 2, seed=seed)
