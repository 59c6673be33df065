# SPDX-License-Identifier: Apache-2.0
"""What styles leave as it is, and what users may change in them, on loopback."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import style_cases

import hyperep
from hyperep.loopback import run
from hyperep.loopback.platform import CAPABILITIES, LoopbackPlatform
from hyperep.moe import GroupedExperts
from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.errors import UnsupportedCapability
from hyperep.styles import UnlikeWeights


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("style", ["ep", "tp", "etp"])
def test_keyword_arguments_reach_the_experts(style, ranks):
    run(lambda platform: style_cases.keyword_arguments_reach_the_experts(platform, style), ranks)


OPTIONS = {
    "balance": lambda: hyperep.ExpertParallel(balance=hyperep.Balance()),
    "balance in slices": lambda: hyperep.ExpertTensorParallel(
        colwise=("weight",), rowwise=(), balance=hyperep.Balance()
    ),
    "biases": lambda: hyperep.TensorParallel(colwise=(), rowwise=("weight", "bias")),
    "biases over ep": lambda: hyperep.ExpertTensorParallel(colwise=(), rowwise=("weight", "bias")),
}


@pytest.mark.parametrize("which", OPTIONS)
def test_what_a_platform_lacks_is_refused_on_every_rank_before_anything_changes(which):
    """Only some ranks would use it, in some step, and the others would wait for them."""

    class Lacking(LoopbackPlatform):
        capabilities = {**CAPABILITIES, Capability.FUNCTIONAL_CALL: Support.UNSUPPORTED}  # noqa: RUF012

    def on_rank(platform):
        platform.__class__ = Lacking
        style = OPTIONS[which]()
        weights = {"weight": np.ones((4, 4, 4)), "bias": np.ones((4, 4))}
        experts = platform.make_module("Biased", weights, lambda m, rows, counts: rows)
        names = style.mesh_dim_names
        mesh = hyperep.init_device_mesh(platform, (2,) if len(names) == 1 else (1, 2), names)
        with pytest.raises(UnsupportedCapability, match=r"functional_call: .*(leave out balance|one rank of tp)"):
            style.apply(experts, mesh)
        assert platform.local(platform.parameters(experts)["weight"]).shape == (4, 4, 4)
        assert platform.sharding(platform.parameters(experts)["weight"]) is None

    run(on_rank, 2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_can_be_overridden(ranks):
    run(style_cases.steps_can_be_overridden, ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_deep_copy_hands_itself_to_the_steps(ranks):
    run(style_cases.a_deep_copy_hands_itself_to_the_steps, ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("which", style_cases.READY)
def test_shards_that_are_there_are_taken(which, ranks):
    run(lambda platform: style_cases.shards_that_are_there_are_taken(platform, which), ranks)


@pytest.mark.parametrize("which", style_cases.UNUSABLE_SHARDS)
def test_other_shards_are_refused_on_every_rank(which):
    run(lambda platform: style_cases.other_shards_are_refused_on_every_rank(platform, which), 2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_distribute_module_converts(ranks):
    run(style_cases.distribute_module_converts, ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_are_parts_of_the_first_ranks_tensor(ranks):
    run(style_cases.shards_are_parts_of_the_first_ranks_tensor, ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("style", ["ep", "tp", "etp"])
def test_buffers_of_experts_are_split(style, ranks):
    ranks = min(ranks, 2) if style == "tp" else ranks  # 6 features
    run(lambda platform: style_cases.buffers_of_experts_are_split(platform, style), ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_buffers_that_cannot_be_decided_are_refused(ranks):
    run(style_cases.buffers_that_cannot_be_decided_are_refused, ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("layout", ["packed", "interleaved"])
@pytest.mark.parametrize("style", ["tp", "etp"])
@pytest.mark.parametrize("biased", [False, True])
def test_fused_weights_agree_with_the_whole(style, layout, biased, ranks):
    run(lambda platform: style_cases.fused_weights_agree_with_the_whole(platform, style, layout, biased), ranks)


@pytest.mark.parametrize("which", style_cases.FUSED)
def test_fused_weights_are_declared_or_refused(which):
    run(lambda platform: style_cases.fused_weights_are_declared_or_refused(platform, which), 2)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_packed_linear_gives_each_rank_its_part_of_each(ranks):
    run(style_cases.a_packed_linear_gives_each_rank_its_part_of_each, ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_tensor_parallel_reaches_modules_below(ranks):
    run(style_cases.tensor_parallel_reaches_modules_below, ranks)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "case",
    [
        style_cases.ties_are_kept,
        style_cases.ties_that_cannot_be_kept_are_refused,
        style_cases.attributes_of_parameters_are_kept,
    ],
)
def test_identity(case, ranks):
    run(case, ranks)


def test_whole_parameters_that_live_on_are_told():
    run(style_cases.whole_parameters_that_live_on_are_told, 1)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("seeds", style_cases.SEEDS)
def test_weights_that_ranks_made_differently_are_told(seeds, ranks):
    if ranks == 1 and seeds not in style_cases.ALIKE:
        return  # a rank that is alone agrees with itself
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", UnlikeWeights)
        run(lambda platform: style_cases.a_style_on_a_layer_of_seeds(platform, seeds), ranks)
    told = [str(w.message) for w in seen if w.category is UnlikeWeights]
    style_cases.require_told(told, seeds, times=ranks)


def _in_a_plan(platform):
    experts = GroupedExperts(platform, 4, 6, 2)
    for handle in platform.parameters(experts).values():
        platform.assign(handle, platform.local(handle) + platform.rank)
    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",))
    hyperep.parallelize_module(experts, mesh, hyperep.ExpertParallel())


def test_a_plan_that_is_checked_first_tells_of_weights_once():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", UnlikeWeights)
        run(_in_a_plan, 2)
    assert [Path(w.filename).name for w in seen if w.category is UnlikeWeights] == ["parallelize.py"] * 2
