# SPDX-License-Identifier: Apache-2.0
"""What styles leave as it is, scores and shards, on torch: the core's neutral cases."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "neutral"))
import score_cases
import style_cases


@pytest.mark.parametrize("style", ["ep", "tp", "etp"])
def test_keyword_arguments_reach_the_experts(two, style):
    two.run(style_cases.keyword_arguments_reach_the_experts, style)


def test_steps_can_be_overridden(two):
    two.run(style_cases.steps_can_be_overridden)


def test_a_deep_copy_hands_itself_to_the_steps(two):
    two.run(style_cases.a_deep_copy_hands_itself_to_the_steps)


@pytest.mark.parametrize("which", style_cases.READY)
def test_shards_that_are_there_are_taken(two, which):
    two.run(style_cases.shards_that_are_there_are_taken, which)


@pytest.mark.parametrize("which", style_cases.UNUSABLE_SHARDS)
def test_other_shards_are_refused_on_every_rank(two, which):
    two.run(style_cases.other_shards_are_refused_on_every_rank, which)


def test_distribute_module_converts(two):
    two.run(style_cases.distribute_module_converts)


def test_shards_are_parts_of_the_first_ranks_tensor(four):
    four.run(style_cases.shards_are_parts_of_the_first_ranks_tensor)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "logsumexp"])
def test_scores_agree(platform, name):
    score_cases.scores_agree(platform, name)


def test_small_sigmoids_keep_their_digits(platform):
    score_cases.small_sigmoids_keep_their_digits(platform)


@pytest.mark.parametrize(("style", "fixture"), [("ep", "two"), ("tp", "two"), ("etp", "four")])
def test_buffers_of_experts_are_split(request, style, fixture):
    request.getfixturevalue(fixture).run(style_cases.buffers_of_experts_are_split, style)


def test_buffers_that_cannot_be_decided_are_refused(two):
    two.run(style_cases.buffers_that_cannot_be_decided_are_refused)


@pytest.mark.parametrize("layout", ["packed", "interleaved"])
@pytest.mark.parametrize(("style", "fixture"), [("tp", "two"), ("tp", "four"), ("etp", "four")])
def test_fused_weights_agree_with_the_whole(request, style, layout, fixture):
    request.getfixturevalue(fixture).run(style_cases.fused_weights_agree_with_the_whole, style, layout)


def test_a_packed_linear_gives_each_rank_its_part_of_each(two):
    two.run(style_cases.a_packed_linear_gives_each_rank_its_part_of_each)


def test_tensor_parallel_reaches_modules_below(two):
    two.run(style_cases.tensor_parallel_reaches_modules_below)


def _packed(platform, folder):
    """A packed weight is a DTensor that PyTorch gathers, clips and trains; its distributed checkpoints refuse it."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import DTensor

    import hyperep

    module = style_cases._fused(platform, "packed")
    whole = module.gate_up.detach().clone()
    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("tp",))
    hyperep.TensorParallel(colwise=("gate_up",), rowwise=("down",), packed={"gate_up": 2}).apply(module, mesh)
    weight = module.gate_up
    assert isinstance(weight, DTensor)
    assert torch.equal(weight.full_tensor(), whole)
    assert platform.sharding(weight).placements == (hyperep.Shard(1, parts=2),)
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.to_local().square().sum().backward()
    norm = torch.nn.utils.clip_grad_norm_([weight], 1e9).full_tensor()
    assert abs(norm / (2 * whole).norm() - 1) < 1e-5
    optimizer.step()
    reference = torch.nn.Parameter(whole.clone())
    reference.square().sum().backward()
    torch.optim.AdamW([reference], lr=0.1).step()
    assert torch.allclose(weight.full_tensor(), reference, rtol=1e-5)
    with pytest.raises(dcp.api.CheckpointException, match="overlapping chunks"):
        dcp.save({"weight": weight}, checkpoint_id=folder)


def test_a_packed_weight_is_a_dtensor(two, tmp_path):
    two.run(_packed, str(tmp_path))


def _buffer(platform):
    """A split buffer is a DTensor and saved as the whole one was; one that was not saved still is not."""
    import torch
    from torch.distributed.tensor import DTensor

    import hyperep

    module = torch.nn.Module()
    module.register_parameter("w", torch.nn.Parameter(torch.ones(4, 3, 2)))
    module.register_buffer("scale", torch.arange(4.0))
    module.register_buffer("cache", torch.arange(4), persistent=False)
    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",))
    hyperep.ExpertParallel().apply(module, mesh)
    assert isinstance(module.scale, DTensor)
    assert isinstance(module.cache, DTensor)
    assert sorted(module.state_dict()) == ["scale", "w"]
    assert module.state_dict()["scale"].full_tensor().tolist() == [0, 1, 2, 3]
    assert not module.cache.requires_grad


def test_a_split_buffer_is_saved_as_before(two):
    two.run(_buffer)


@pytest.mark.parametrize(
    "case",
    [
        style_cases.ties_are_kept,
        style_cases.ties_that_cannot_be_kept_are_refused,
        style_cases.attributes_of_parameters_are_kept,
    ],
)
def test_identity(two, case):
    two.run(case)


def test_whole_parameters_that_live_on_are_told(platform):
    style_cases.whole_parameters_that_live_on_are_told(platform)


def _told_of_seeds(platform, seeds):
    import warnings

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        style_cases.a_style_on_a_layer_of_seeds(platform, seeds)
    style_cases.require_told([str(w.message) for w in seen], seeds)


@pytest.mark.parametrize("seeds", ["one for all", "one for each"])
def test_weights_that_ranks_made_differently_are_told(two, seeds):
    two.run(_told_of_seeds, seeds)


def test_weights_that_are_nowhere_yet_are_not_compared(two):
    two.run(_on_meta)


def _on_meta(platform):
    import warnings

    import hyperep_torch
    import torch

    import hyperep

    mesh = hyperep.init_device_mesh(platform, (2,), ("ep",))
    with torch.device("meta"):
        layer = hyperep_torch.MoE(8, 4, 4, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hyperep.ExpertParallel().apply(layer.experts, mesh)
    assert layer.experts.w1.is_meta


def test_an_optimizer_made_before_is_told(platform):
    import torch

    import hyperep
    from hyperep.moe import MoE
    from hyperep.styles import StaleParameters

    layer = MoE(platform, 8, 4, 4, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    mesh = hyperep.init_device_mesh(platform, (1,), ("ep",))
    with pytest.warns(StaleParameters, match=r"'experts.w1', 'experts.w2', 'experts.w3': shards have .* an optimizer"):
        hyperep.parallelize_module(layer, mesh, {"experts": hyperep.ExpertParallel()})
    assert len(optimizer.param_groups[0]["params"]) == 4


def test_hooks_and_gradients_of_the_whole_are_told(platform):
    import torch

    import hyperep

    module = torch.nn.Module()
    module.w = torch.nn.Parameter(torch.ones(4, 3, 2))
    module.v = torch.nn.Parameter(torch.ones(4, 3, 2))
    module.w.register_hook(lambda g: 2 * g)
    module.v.register_post_accumulate_grad_hook(lambda p: None)
    module.v.sum().backward()
    mesh = hyperep.init_device_mesh(platform, (1,), ("ep",))
    with pytest.warns(UserWarning, match="has .*which its shard does not get") as seen:
        hyperep.ExpertParallel().apply(module, mesh)
    told = {str(w.message).split(", which")[0] for w in seen if "its shard" in str(w.message)}
    assert told == {"parameter 'w' has hooks", "parameter 'v' has hooks and a gradient"}


def test_one_parameter_under_two_names(platform):
    """A tie inside one module, and a frozen parameter, stay what they are."""
    import torch

    import hyperep

    module = torch.nn.Module()
    module.w = module.again = torch.nn.Parameter(torch.ones(4, 3, 2), requires_grad=False)
    hyperep.ExpertParallel().apply(module, hyperep.init_device_mesh(platform, (1,), ("ep",)))
    assert module.w is module.again
    assert isinstance(module.w, torch.distributed.tensor.DTensor)
    assert not module.w.requires_grad


def _plain_buffers(platform):
    """A module of PyTorch's own reads its split buffer as a plain tensor, changes it, and sets another one."""
    import torch

    import hyperep

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.arange(1.0, 5).reshape(4, 1, 1).expand(4, 3, 3).clone())
            self.register_buffer("scale", torch.arange(1.0, 5))
            self.register_buffer("seen", torch.zeros(4))
            self.register_buffer("calls", torch.tensor(0))

        def forward(self, rows, counts):
            experts = torch.repeat_interleave(torch.arange(len(counts)), counts)
            self.calls = self.calls + 1
            self.seen += counts
            self.scale = self.scale * 1.0
            return rows * self.w[experts][:, :, 0] * self.scale[experts][:, None]

    module = Experts()
    hyperep.ExpertParallel().apply(module, hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",)))
    counts = torch.tensor([1, 2, 0, 1])
    for _ in range(2):
        out = module(torch.ones(4, 3), counts)
        assert out[:, 0].tolist() == [1, 4, 4, 16]
    assert int(module.calls) == 2
    assert module.seen.full_tensor().tolist() == [4, 8, 0, 4]
    assert module.scale.full_tensor().tolist() == [1, 2, 3, 4]


def test_a_plain_module_reads_its_split_buffers(two):
    two.run(_plain_buffers)
