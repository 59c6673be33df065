# SPDX-License-Identifier: Apache-2.0
"""Settings that cannot work: every rank raises the same error, and nothing has been changed. Runs on every platform."""

import re

import numpy as np
import pytest

import hyperep
from hyperep.moe import (
    GroupedExperts,
    Linear,
    LossCoefficients,
    MoE,
    MoEConfig,
    RouterConfig,
    TopKRouter,
    auxiliary_loss,
    build_moe,
    global_load_balancing_loss,
    route,
    sequence_load_balancing_loss,
    update_expert_bias,
)


def _mesh(platform, *shape, names=("ep", "tp")):
    return hyperep.init_device_mesh(platform, shape, names[: len(shape)])


def _experts(platform, dim=8, hidden_dim=4, num_experts=4):
    return GroupedExperts(platform, dim, hidden_dim, num_experts)


def _twice(platform, style, module, mesh):
    style.apply(module, mesh)
    style.apply(module, mesh)


def _router(**settings):
    return lambda platform: RouterConfig(**{"num_experts": 8, "top_k": 2, **settings})


def _layer(**settings):
    router = RouterConfig(num_experts=8, top_k=2)
    return lambda platform: MoEConfig(**{"dim": 8, "hidden_dim": 4, "router": router, **settings})


def _plan(plan):
    return lambda p: hyperep.parallelize_module(MoE(p, 8, 4, 4, 2), _mesh(p, p.world_size), plan)


def _routing(platform):
    return route(platform, platform.xp.zeros((6, 4)), RouterConfig(num_experts=4, top_k=1))


MESHES = {
    "mesh larger than the world": (
        lambda p: _mesh(p, p.world_size, 3),
        r"mesh of shape \(2, 3\) needs 6 ranks, but the world has 2; launch at least 6 ranks or choose a smaller shape",
    ),
    "mesh of parts of ranks": (
        lambda p: hyperep.init_device_mesh(p, (2.7,), ("ep",)),
        r"mesh shape \(2.7,\) must be whole numbers, one for each dimension, as in \(2, 4\)",
    ),
    "mesh shape that is no tuple": (
        lambda p: hyperep.init_device_mesh(p, 2, ("ep",)),
        r"mesh shape 2 must be whole numbers, one for each dimension, as in \(2, 4\)",
    ),
    "names that are one string": (
        lambda p: hyperep.init_device_mesh(p, (2, 1), "ep"),
        r"mesh_dim_names='ep' is one string; give a name for each dimension of shape \(2, 1\), as in \('ep',\)",
    ),
    "names that are no strings": (
        lambda p: hyperep.init_device_mesh(p, (2,), (1,)),
        r"mesh_dim_names=\(1,\) must hold one distinct name for each dimension",
    ),
    "dimension before the first": (
        lambda p: _mesh(p, 2).size(-2),
        "mesh dimension -2 does not exist; this mesh has 1 dimensions",
    ),
    "plan for a mesh in another order": (
        lambda p: hyperep.parallelize_module(
            MoE(p, 8, 4, 4, 2), _mesh(p, 2, 1, names=("tp", "ep")), {"experts": hyperep.ExpertTensorParallel()}
        ),
        r"ExpertTensorParallel needs a 2-D mesh \[ep, tp\], but got .*tp=2, ep=1",
    ),
    "mesh of no ranks": (lambda p: _mesh(p, 0), r"mesh shape \(0,\) must have .* each of size 1 or more"),
    "a name for each dimension": (
        lambda p: hyperep.init_device_mesh(p, (2, 1), ("ep",)),
        r"mesh_dim_names=\('ep',\) must hold one distinct name for each dimension of shape \(2, 1\)",
    ),
    "unknown dimension": (lambda p: _mesh(p, 2)["tp"], r"mesh dimension 'tp' does not exist; this mesh has \('ep',\)"),
    "which dimension": (lambda p: _mesh(p, 2, 1).get_group(), "get_group.* on a mesh of dimensions .*: say which one"),
    "ep on a 2-D mesh": (
        lambda p: hyperep.ExpertParallel().apply(_experts(p), _mesh(p, 2, 1)),
        r"ExpertParallel needs a 1-D mesh \[ep\], but got DeviceMesh\(\w+: ep=2, tp=1",
    ),
    "etp on a 1-D mesh": (
        lambda p: hyperep.ExpertTensorParallel().apply(_experts(p), _mesh(p, 2)),
        r"ExpertTensorParallel needs a 2-D mesh \[ep, tp\], but got .*ep=2",
    ),
    "wrong names": (
        lambda p: hyperep.TensorParallel().apply(_experts(p), _mesh(p, 2)),
        r"TensorParallel needs a 1-D mesh \[tp\], but got .*ep=2",
    ),
    "names in the wrong order": (
        lambda p: hyperep.ExpertTensorParallel().apply(_experts(p), _mesh(p, 2, 1, names=("tp", "ep"))),
        r"needs a 2-D mesh \[ep, tp\], but got .*tp=2, ep=1",
    ),
}
STYLES = {
    "experts do not divide": (
        lambda p: hyperep.ExpertParallel().apply(_experts(p, num_experts=5), _mesh(p, 2)),
        "num_experts=5 is not divisible by the ep dimension 2; choose a multiple of 2 experts, or an ep size",
    ),
    "experts do not divide in a dispatch": (
        lambda p: hyperep.dispatch(p.xp.zeros((0, 2)), p.from_host(np.zeros(5, np.int64)), _mesh(p, 2)),
        "num_experts=5 is not divisible by the 2 ranks .*; choose a number of experts that is a multiple of 2",
    ),
    "hidden size does not divide": (
        lambda p: hyperep.TensorParallel().apply(_experts(p, hidden_dim=5), _mesh(p, 2, names=("tp",))),
        r"'w1' of shape \(4, 5, 8\) cannot be split in dim 1 by the tp dimension 2.*must be a multiple of 2",
    ),
    "hidden size does not divide, etp": (
        lambda p: hyperep.ExpertTensorParallel().apply(_experts(p, hidden_dim=5), _mesh(p, 1, 2)),
        r"'w1' of shape \(4, 5, 8\) cannot be split in dim 1 by the tp dimension 2",
    ),
    "unnamed weight": (
        lambda p: hyperep.TensorParallel(colwise=("w1",)).apply(_experts(p), _mesh(p, 2, names=("tp",))),
        r"'w3' is neither in colwise=\('w1',\) nor in rowwise=\('w2',\); name it in one of them",
    ),
    "weight named twice": (
        lambda p: hyperep.TensorParallel(rowwise=("w1", "w2")),
        r"\['w1'\] are both colwise and rowwise",
    ),
    "output layout": (
        lambda p: hyperep.TensorParallel(output_layout=hyperep.Shard(0)),
        r"output_layout=Shard\(0\): choose Replicate\(\) or Partial\(\)",
    ),
    "apply twice": (
        lambda p: _twice(p, hyperep.ExpertParallel(), _experts(p), _mesh(p, 2)),
        r"'w1' is distributed already, as \[Shard\(0\)\]; a style is applied once",
    ),
    "tp applied twice": (
        lambda p: _twice(p, hyperep.TensorParallel(), _experts(p), _mesh(p, 2, names=("tp",))),
        r"'w1' is distributed already, as \[Shard\(1\)\]; a style is applied once",
    ),
    "the layer, not its experts": (
        lambda p: hyperep.ExpertParallel().apply(MoE(p, 8, 4, 5, 2), _mesh(p, 2)),
        "num_experts=5 is not divisible|dim 0 of every parameter must be the expert|apply the style to the experts",
    ),
    "no experts at all": (
        lambda p: hyperep.ExpertParallel().apply(p.make_module("Empty", {}, lambda m: None), _mesh(p, 2)),
        "the module has no parameters; apply the style to the module that holds the experts",
    ),
    "colwise does not divide": (
        lambda p: hyperep.ColwiseParallel().apply(Linear(p, 4, 5), _mesh(p, 2, names=("tp",))),
        r"ColwiseParallel: out=5 features of weight \(5, 4\) are not divisible by the tp dimension 2; choose",
    ),
    "rowwise does not divide": (
        lambda p: hyperep.RowwiseParallel().apply(Linear(p, 5, 4), _mesh(p, 2, names=("tp",))),
        r"RowwiseParallel: in=5 features of weight \(4, 5\) are not divisible by the tp dimension 2; choose",
    ),
    "rowwise twice": (
        lambda p: _twice(p, hyperep.RowwiseParallel(), Linear(p, 4, 4), _mesh(p, 2, names=("tp",))),
        r"'weight' is distributed already, as \[Shard\(1\)\]",
    ),
    "colwise on experts": (
        lambda p: hyperep.ColwiseParallel().apply(_experts(p), _mesh(p, 2, names=("tp",))),
        r"must have parameters 'weight' \[out, in\].*for experts use TensorParallel",
    ),
    "partial with bias": (
        lambda p: hyperep.RowwiseParallel(output_layout=hyperep.Partial()).apply(
            Linear(p, 4, 4, bias=True), _mesh(p, 2, names=("tp",))
        ),
        "would hold it more than once; leave the bias out and add it after your reduction",
    ),
    "plan that matches nothing": (
        _plan({"expert": hyperep.ExpertParallel()}),
        "plan entry 'expert' matches no part of the module; did you mean 'experts'?",
    ),
    "plan far from everything": (
        _plan({"layers.*.q": hyperep.ExpertParallel()}),
        "plan entry 'layers.*.q' matches no part of the module; its parts are 'router', 'experts'",
    ),
    "plan entries that meet": (
        _plan({"experts": hyperep.ExpertParallel(), "e*": hyperep.ExpertParallel()}),
        r"plan entries 'experts' and 'e\*' both match 'experts'; a part gets one style",
    ),
}
SETTINGS = {
    "top_k above the experts": (_router(top_k=9), "top_k=9 must be between 1 and num_experts=8"),
    "half an expert per token": (_router(top_k=1.5), "top_k=1.5 must be a whole number"),
    "no number of experts per token": (lambda p: MoE(p, 8, 4, 4, None), "top_k=None must be a whole number"),
    "half a group": (_router(num_groups=2.0), "num_groups=2.0 must be a whole number"),
    "size that is no number": (_layer(dim="8"), "dim='8' must be a whole number"),
    "features that are no number": (lambda p: Linear(p, 4.0, 4), "Linear: in_features=4.0 must be a whole number"),
    "top_k of the router": (lambda p: TopKRouter(p, 8, 4, 5), "top_k=5 must be between 1 and num_experts=4"),
    "one score normalised": (
        lambda p: MoEConfig(dim=8, hidden_dim=4, router=RouterConfig(num_experts=4, top_k=1, normalize=True)),
        "normalize=True with top_k=1: one score divided by itself is 1 .* leave normalize out",
    ),
    "no experts per token": (lambda p: MoE(p, 8, 4, 4, 0), "top_k=0 must be between 1 and num_experts=4"),
    "score function": (_router(score_function="relu"), "score_function='relu': choose 'softmax' or 'sigmoid'"),
    "route scale": (_router(route_scale=0.0), "route_scale=0.0 must be a positive number"),
    "groups do not divide": (_router(num_groups=3), "num_groups=3 does not divide num_experts=8; choose a divisor"),
    "too many top groups": (_router(num_groups=4, top_groups=5), "top_groups=5 must be between 1 and num_groups=4"),
    "groups hold too few": (
        _router(num_groups=8, top_groups=1),
        "top_groups=1 groups of 1 experts hold 1, fewer than top_k=2; raise top_groups or lower top_k",
    ),
    "capacity below one": (
        _layer(capacity_factor=0.5),
        "capacity_factor=0.5 must be at least 1.*or None to drop nothing",
    ),
    "capacity not a number": (_layer(capacity_factor=float("nan")), "capacity_factor=nan must be at least 1"),
    "drop policy": (_layer(drop_policy="random"), "drop_policy='random': choose 'probability' or 'position'"),
    "size": (_layer(hidden_dim=0), "hidden_dim=0 must be at least 1"),
    "shared experts": (_layer(num_shared_experts=-1), "num_shared_experts=-1 must be at least 0"),
    "loss coefficient": (lambda p: LossCoefficients(z=-1.0), "loss coefficient z=-1.0 must be a number from 0 on"),
    "sequences": (
        lambda p: sequence_load_balancing_loss(p, _routing(p), 4),
        "6 tokens do not form 4 sequences of equal length; give a divisor",
    ),
    "global loss without a mesh": (
        lambda p: auxiliary_loss(p, _routing(p), LossCoefficients(global_batch=0.1)),
        "global_batch=0.1: the global loss needs the mesh",
    ),
    "no expert bias": (
        lambda p: update_expert_bias(p, MoE(p, 8, 4, 4, 2), p.xp.zeros((4,), dtype=p.xp.int64), 0.1),
        r"found 0 buffers named 'expert_bias' \(none\); give one layer that was made with .*expert_bias=True",
    ),
    "linear size": (lambda p: Linear(p, 0, 4), r"Linear\(in_features=0\): must be at least 1"),
    "experts size": (lambda p: GroupedExperts(p, 4, 4, 0), r"GroupedExperts\(num_experts=0\): must be at least 1"),
}
CASES = {**MESHES, **STYLES, **SETTINGS}


def raises_on_every_rank(platform, name):
    """The error arrives on this rank (each rank runs this), and the ranks are still in step afterwards."""
    build, message = CASES[name]
    with pytest.raises(ValueError, match=message):
        build(platform)
    ranks = platform.all_gather(platform.from_host(np.array([platform.rank])))
    assert platform.to_host(ranks)[0].tolist() == list(range(platform.world_size))


def a_refused_style_changes_nothing(platform):
    """After an error in the plan or in a size, every parameter is still whole and the layer still runs."""
    layer = build_moe(platform, MoEConfig(dim=8, hidden_dim=5, router=RouterConfig(num_experts=4, top_k=2)))
    mesh = _mesh(platform, 1, platform.world_size)
    before = platform.to_host(layer(platform.xp.ones((3, 8))))[0]
    with pytest.raises(ValueError, match="matches no part"):
        hyperep.parallelize_module(
            layer, mesh, {"router": hyperep.ColwiseParallel(), "nothing": hyperep.ColwiseParallel()}
        )
    with pytest.raises(ValueError, match="cannot be split"):
        hyperep.parallelize_module(layer, mesh, {"experts": hyperep.ExpertTensorParallel()})
    assert all(platform.sharding(parameter) is None for parameter in platform.parameters(layer).values())
    assert np.array_equal(platform.to_host(layer(platform.xp.ones((3, 8))))[0], before)


NONE = {
    "a mesh for a style": lambda p: hyperep.ExpertParallel().apply(_experts(p), None),
    "a mesh for a plan": lambda p: hyperep.parallelize_module(_experts(p), None, hyperep.ExpertParallel()),
    "a mesh for a tensor": lambda p: hyperep.distribute_tensor(p.xp.zeros((2,)), None, [hyperep.Shard(0)]),
    "a mesh for a dispatch": lambda p: hyperep.dispatch(p.xp.zeros((0, 2)), p.xp.zeros((2,), dtype=p.xp.int64), None),
    "a mesh for a parameter": lambda p: hyperep.distribute_parameter(_module(p, (4, 2)), "w", None, [hyperep.Shard(0)]),
    "a mesh for a module": lambda p: hyperep.distribute_module(_module(p, (4, 2)), None),
    "a mesh for a loss": lambda p: global_load_balancing_loss(p, _routing(p), None),
}


def none_is_no_mesh(platform, name):
    """One line that says what is wanted."""
    with pytest.raises(TypeError, match=r"mesh=None of type builtins.NoneType is neither a hyperep.DeviceMesh nor"):
        NONE[name](platform)


def none_is_no_platform():
    """A platform that was forgotten, and its name in its place."""
    for given in (None, "loopback", (2,)):
        with pytest.raises(TypeError, match=rf"init_device_mesh\(platform={re.escape(repr(given))}\): give a platform"):
            hyperep.init_device_mesh(given, (1,))


def _module(platform, shape):
    return platform.make_module("Experts", {"w": platform.xp.zeros(shape)}, lambda m, x, counts: x)


UNLIKE = {
    "shape": (
        lambda p, m, odd: hyperep.distribute_tensor(p.xp.zeros((4, 2 if odd else 3)), m, [hyperep.Shard(0)]),
        r"distribute_tensor: rank {odd} has .*loat32 of shape \(4, 2\), but rank 0 has .*loat32 of shape \(4, 3\)",
    ),
    "dtype": (
        lambda p, m, odd: hyperep.distribute_tensor(
            p.xp.zeros((4,), dtype=p.xp.int32 if odd else p.xp.float32), m, [hyperep.Shard(0)]
        ),
        r"distribute_tensor: rank {odd} has .*[Ii]nt32 of shape \(4,\), but rank 0 has .*loat32 of shape \(4,\)",
    ),
    "placement": (
        lambda p, m, odd: hyperep.distribute_tensor(
            p.xp.zeros((4,)), m, [hyperep.Replicate() if odd else hyperep.Shard(0)]
        ),
        r"distribute_tensor: rank {odd} has placements \[Replicate\(\)\], but rank 0 has placements \[Shard\(0\)\]",
    ),
    "a size that does not divide on one rank": (
        lambda p, m, odd: hyperep.distribute_tensor(p.xp.zeros((5 if odd else 4,)), m, [hyperep.Shard(0)]),
        r"distribute_tensor: rank {odd} has .* of shape \(5,\), but rank 0 has .* of shape \(4,\)",
    ),
    "a list": (
        lambda p, m, odd: hyperep.distribute_tensor([1.0] * 4 if odd else p.xp.zeros((4,)), m, [hyperep.Shard(0)]),
        r"distribute_tensor: rank {odd} has a builtins.list, but rank 0 has .*loat32 of shape",
    ),
    "a parameter": (
        lambda p, m, odd: hyperep.distribute_parameter(_module(p, (4, 8 if odd else 6)), "w", m, [hyperep.Shard(0)]),
        r"distribute_parameter of 'w': rank {odd} has .* of shape \(4, 8\), but rank 0 has .* of shape \(4, 6\)",
    ),
    "no parameter": (
        lambda p, m, odd: hyperep.distribute_parameter(_module(p, (4, 2)), "v" if odd else "w", m, [hyperep.Shard(0)]),
        r"distribute_parameter.*: rank {odd} has none of \['w'\], but rank 0 has ",
    ),
    "experts": (
        lambda p, m, odd: hyperep.ExpertParallel().apply(_experts(p, num_experts=5 if odd else 4), m),
        r"ExpertParallel: rank {odd} has 'w1', .* of shape \(5, 4, 8\), but rank 0 has 'w1', .* of shape \(4, 4, 8\)",
    ),
    "no experts": (
        lambda p, m, odd: hyperep.ExpertParallel().apply(
            p.make_module("Empty", {}, lambda m: None) if odd else _module(p, (4, 2)), m
        ),
        r"ExpertParallel: rank {odd} has nothing more, but rank 0 has 'w', .* of shape \(4, 2\)",
    ),
    "another style": (
        lambda p, m, odd: (hyperep.TensorParallel() if odd else hyperep.ExpertParallel()).apply(
            _experts(p), _renamed(p, "tp" if odd else "ep")
        ),
        r"ExpertParallel|TensorParallel: rank {odd} has TensorParallel, but rank 0 has ExpertParallel",
    ),
    "plan": (
        lambda p, m, odd: hyperep.parallelize_module(
            MoE(p, 8, 4, 4, 2), m, {"experts" if odd else "e*": hyperep.ExpertParallel()}
        ),
        r"parallelize_module: rank {odd} has plan entry 'experts', ExpertParallel, but rank 0 has plan entry 'e\*'",
    ),
    "plan for another model": (
        lambda p, m, odd: hyperep.parallelize_module(
            p.make_module("M", {}, lambda m, x: x) if odd else MoE(p, 8, 4, 4, 2),
            m,
            {"experts": hyperep.ExpertParallel()},
        ),
        r"parallelize_module: rank {odd} has nothing more, but rank 0 has part 'router'",
    ),
    "features": (
        lambda p, m, odd: hyperep.ColwiseParallel().apply(Linear(p, 4, 5 if odd else 4), _renamed(p, "tp")),
        r"ColwiseParallel: rank {odd} has 'weight', .* of shape \(5, 4\), but rank 0 has 'weight', .* \(4, 4\)",
    ),
}


def _renamed(platform, name):
    return hyperep.init_device_mesh(platform, (platform.world_size,), (name,))


def unlike_on_one_rank_raises_on_all(platform, name):
    """What one rank gives another form is refused on every rank, and they are still in step afterwards."""
    build, message = UNLIKE[name]
    odd = platform.world_size - 1
    mesh = _mesh(platform, platform.world_size)
    with pytest.raises(ValueError, match=message.format(odd=odd)):
        build(platform, mesh, platform.rank == odd)
    ranks = platform.all_gather(platform.from_host(np.array([platform.rank])))
    assert platform.to_host(ranks)[0].tolist() == list(range(platform.world_size))


def unlike_in_a_grid_raises_on_all(platform):
    """On a mesh of two dimensions the ranks whose lines agree hear of it as well."""
    mesh = _mesh(platform, 2, 2)
    odd = platform.rank == 2
    with pytest.raises(ValueError, match=r"rank 2 has .* of shape \(4, 8\), but rank 0 has .* of shape \(4, 6\)"):
        hyperep.distribute_tensor(
            platform.xp.zeros((4, 8 if odd else 6)), mesh, [hyperep.Shard(0), hyperep.Replicate()]
        )
    tensor = hyperep.distribute_tensor(platform.xp.ones((4, 6)), mesh, [hyperep.Shard(0), hyperep.Shard(1)])
    assert tuple(tensor.shape) == (4, 6)
