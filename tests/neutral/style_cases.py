# SPDX-License-Identifier: Apache-2.0
"""What styles leave as it is, and what users may change in them. Runs on every platform."""

import copy
import gc
import weakref

import numpy as np
from measure import relative, rows

import hyperep
from hyperep.styles.expert import ExpertParallel

EXPERTS, DIM = 4, 4


def _scaling_experts(platform):
    """Experts of a user's own: one matrix each, and a keyword argument."""
    weight = rows(5, EXPERTS, DIM, DIM)

    def forward(m, x, tokens_per_expert, *, scale=1.0):
        return scale * platform.grouped_matmul(x, m.weight, tokens_per_expert)

    return platform.make_module("Scaling", {"weight": platform.from_host(weight)}, forward), weight


def keyword_arguments_reach_the_experts(platform, style):
    """A keyword given to wrapped experts arrives, and its absence leaves the default."""
    ep, tp = (platform.world_size, 1) if style != "tp" else (1, platform.world_size)
    experts, weight = _scaling_experts(platform)
    if style == "ep":
        hyperep.ExpertParallel().apply(experts, hyperep.init_device_mesh(platform, (ep,), ("ep",)))
    else:
        shape, names = ((tp,), ("tp",)) if style == "tp" else ((ep, 1), ("ep", "tp"))
        chosen = {"tp": hyperep.TensorParallel, "etp": hyperep.ExpertTensorParallel}[style]
        mesh = hyperep.init_device_mesh(platform, shape, names)
        if style == "tp":
            # One row-parallel matrix: its input features are split, so each rank gets its own slice of the rows.
            chosen(colwise=(), rowwise=("weight",)).apply(experts, mesh)
        else:
            chosen(colwise=("weight",), rowwise=()).apply(experts, mesh)
    counts = np.array([2, 0, 3, 1])
    x = rows(platform.rank if style != "tp" else 0, 6, DIM)
    part = DIM // tp
    given = x[:, platform.rank * part : (platform.rank + 1) * part] if style == "tp" else x
    expected = np.concatenate([r @ w.T for r, w in zip(np.split(x, np.cumsum(counts)[:-1]), weight, strict=True)])
    for keywords, factor in (({}, 1.0), ({"scale": 3.0}, 3.0)):
        out = experts(platform.from_host(given), platform.from_host(counts), **keywords)
        assert relative(platform.to_host(out)[0], factor * expected) < 1e-5


class Noisy(ExpertParallel):
    """A style of a user's own: what dispatch tells combine travels in the context."""

    def _token_dispatch(self, module, inputs, mesh, num_experts):
        local_inputs, context = super()._token_dispatch(module, inputs, mesh, num_experts)
        return local_inputs, (context, len(context.tokens_per_local_expert))

    def _token_combine(self, module, routed_output, mesh, context):
        inner, experts_here = context
        return experts_here * super()._token_combine(module, routed_output, mesh, inner)


def steps_can_be_overridden(platform):
    """A subclass that changes two of the three steps, and multiplies by the number of this rank's experts."""
    experts, weight = _scaling_experts(platform)
    Noisy().apply(experts, hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",)))
    x = rows(platform.rank, EXPERTS, DIM)
    out = experts(platform.from_host(x), platform.from_host(np.ones(EXPERTS, np.int32)))
    expected = EXPERTS // platform.world_size * np.stack([r @ w.T for r, w in zip(x, weight, strict=True)])
    assert relative(platform.to_host(out)[0], expected) < 1e-5


class Watching(ExpertParallel):
    """A style that notes which module each step was given."""

    def __init__(self):
        self.seen = []

    def _token_dispatch(self, module, inputs, mesh, num_experts):
        self.seen.append(module)
        return super()._token_dispatch(module, inputs, mesh, num_experts)

    def _token_combine(self, module, routed_output, mesh, context):
        self.seen.append(module)
        return super()._token_combine(module, routed_output, mesh, context)


def a_deep_copy_hands_itself_to_the_steps(platform):
    """Steps and converters of a copy get the copy, and the original dies when nobody else holds it."""
    style = Watching()
    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",))
    experts = style.apply(_scaling_experts(platform)[0], mesh)
    converted = []
    hyperep.distribute_module(experts, mesh, input_fn=lambda m, inputs, mesh: converted.append(m) or inputs)
    twin = copy.deepcopy(experts)
    twin(platform.from_host(rows(platform.rank, EXPERTS, DIM)), platform.from_host(np.ones(EXPERTS, np.int32)))
    assert [m is twin for m in (*style.seen, *converted)] == [True] * 3
    original = weakref.ref(experts)
    del experts
    gc.collect()
    assert original() is None


def distribute_module_converts(platform):
    """``distribute_module``: partition, convert what goes in and out, and keep keywords."""
    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",))
    experts, _ = _scaling_experts(platform)
    visited = []

    def partition(path, module, mesh):
        visited.append(path)
        hyperep.distribute_parameter(module, "weight", mesh, [hyperep.Shard(0)])

    got = hyperep.distribute_module(
        experts,
        mesh,
        partition_fn=partition,
        input_fn=lambda module, inputs, mesh: (2.0 * inputs[0], inputs[1]),
        output_fn=lambda module, outputs, mesh: outputs + 1.0,
    )
    assert got is experts
    assert visited == [""]
    local = platform.local(platform.parameters(experts)["weight"])
    assert tuple(local.shape) == (EXPERTS // platform.world_size, DIM, DIM)
    x, counts = rows(1, 3, DIM), np.array([3, *[0] * (EXPERTS // platform.world_size - 1)])
    out = experts(platform.from_host(x), platform.from_host(counts), scale=5.0)
    expected = 10.0 * x @ platform.to_host(local)[0][0].T + 1.0
    assert relative(platform.to_host(out)[0], expected) < 1e-5


def shards_are_parts_of_the_first_ranks_tensor(platform):
    """Ranks that drew different weights hold parts of one tensor, in every placement; gathering gives it back."""
    from hyperep.sharding import Sharding, gather_tensor, shard_tensor

    shape = (2, platform.world_size // 2) if platform.world_size > 1 else (1, 1)
    mesh = hyperep.init_device_mesh(platform, shape, ("ep", "tp"))
    whole = rows(0, 8, 4)
    replicate, partial = hyperep.Replicate(), hyperep.Partial()
    for placements in (
        (hyperep.Shard(0), hyperep.Shard(1)),
        (hyperep.Shard(0), hyperep.Shard(0)),
        (hyperep.Shard(1), replicate),
        (replicate, replicate),
        (partial, hyperep.Shard(0)),
        (replicate, partial),
    ):
        sharding = Sharding(mesh, placements)
        local = shard_tensor(platform.from_host(rows(platform.rank, 8, 4)), sharding)
        assert tuple(local.shape) == sharding.local_shape((8, 4))
        assert sharding.global_shape(local.shape) == (8, 4)
        slices = sharding.local_slices((8, 4))
        expected = whole[slices]
        for dimension, placement in enumerate(placements):
            if placement == partial and mesh.get_local_rank(dimension):
                expected = np.zeros_like(expected)
        assert np.array_equal(platform.to_host(local)[0], expected), placements
        assert np.array_equal(platform.to_host(gather_tensor(local, sharding))[0], whole), placements
