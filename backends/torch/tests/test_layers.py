# SPDX-License-Identifier: Apache-2.0
"""The core's layers as classes of PyTorch."""

import copy
import dataclasses
import pickle

import hyperep_torch as hep
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import hyperep
from hyperep.moe import PRESETS, MoEConfig, RouterConfig, build_moe

CONFIG = MoEConfig(
    dim=8,
    hidden_dim=12,
    router=RouterConfig(num_experts=4, top_k=2, score_function="sigmoid", expert_bias=True, route_scale=2.0),
    num_shared_experts=1,
    capacity_factor=1.5,
)


def test_it_computes_what_the_neutral_layer_computes(platform):
    neutral, layer = build_moe(platform, CONFIG), hep.MoE.of(CONFIG)
    assert layer.config == CONFIG
    layer.load_state_dict(neutral.state_dict())
    x = torch.randn(3, 7, 8)
    results = []
    for module in (neutral, layer):
        leaf = x.clone().requires_grad_()
        out, stats = module(leaf, with_stats=True)
        out.square().sum().backward()
        results.append([out, stats.tokens_per_expert, leaf.grad, *(p.grad for p in module.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_options_are_those_of_both_configurations():
    layer = hep.MoE(8, 12, 4, 2, num_groups=2, top_groups=1, num_shared_experts=2, normalize=False)
    router = RouterConfig(num_experts=4, top_k=2, num_groups=2, normalize=False)
    assert layer.config == MoEConfig(dim=8, hidden_dim=12, router=router, num_shared_experts=2)
    assert layer.shared_experts.w1.weight.shape == (24, 8)
    with pytest.raises(TypeError, match=r"no options \['normalise'\]; it has .*'normalize'"):
        hep.MoE(8, 12, 4, 2, normalise=False)
    with pytest.raises(ValueError, match="top_k=5 must be between 1 and num_experts=4"):
        hep.MoE(8, 12, 4, 5)
    preset = PRESETS["deepseek-v3"].config
    assert hep.MoE.of(preset, device="meta").config == preset


def test_it_obeys_the_default_device_and_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        layer = hep.MoE.of(CONFIG)
    finally:
        torch.set_default_dtype(torch.float32)
    # The bias is bookkeeping and stays wide enough for its small steps.
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert layer.router.expert_bias.dtype == torch.float32
    assert {p.dtype for p in hep.MoE.of(CONFIG, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    with torch.device("meta"):
        meta = hep.MoE.of(CONFIG)
    assert {t.device.type for t in meta.state_dict().values()} == {"meta"}


def _hundred_billion(platform):
    config = dataclasses.replace(PRESETS["deepseek-v3"].config, dim=8192, hidden_dim=8192)
    with torch.device("meta"):
        model = nn.Sequential(*(hep.MoE.of(config) for _ in range(2)))
    count = sum(p.numel() for p in model.parameters())
    hep.parallelize_module(
        model, init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)), {"*.experts": hep.ExpertParallel()}
    )
    return count, sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())


def test_a_hundred_billion_parameters_cost_nothing_on_meta(two):
    for count, own in two.run(_hundred_billion):
        assert count > 100e9
        assert own < 0.51 * count


@pytest.mark.parametrize("again", [False, True], ids=["made", "reset"])
def test_initial_weights_are_those_of_linear_modules(again):
    torch.manual_seed(3)
    layer = hep.MoE(32, 64, 16, 2, expert_bias=True)
    if again:
        before = layer.experts.w1.clone()
        layer.router.expert_bias.fill_(1.0)
        layer.experts.reset_parameters()
        layer.router.reset_parameters()
        assert (layer.experts.w1 - before).abs().mean() > 0.05
        assert not layer.router.expert_bias.any()
    experts = layer.experts
    for weight, fan_in in ((experts.w1, 32), (experts.w2, 64), (experts.w3, 32), (layer.router.gate, 32)):
        assert weight.abs().max() <= fan_in**-0.5
        assert abs(weight.std() * (3 * fan_in) ** 0.5 - 1) < 0.1
    assert (layer.experts.w1[0] - layer.experts.w1[1]).abs().mean() > 0.05  # no two experts alike


def test_it_is_pickled_and_copied_with_its_weights():
    layer = hep.MoE.of(CONFIG)
    x = torch.randn(5, 8)
    for twin in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert torch.equal(twin(x), layer(x))
        with torch.no_grad():
            twin.experts.w2.zero_()
        assert layer.experts.w2.any()


def _sharded(platform):
    torch.manual_seed(0)
    whole = hep.MoE(8, 12, 4, 2, dtype=torch.float64)
    layer = copy.deepcopy(whole)
    hyperep.ExpertParallel().apply(layer.experts, hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",)))
    assert isinstance(layer.experts.w1, DTensor)
    xs = [torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(r)) for r in range(2)]
    layer(xs[platform.rank]).square().sum().backward()
    sum(whole(x).square().sum() for x in xs).backward()
    torch.testing.assert_close(layer(xs[platform.rank]), whole(xs[platform.rank]))
    for name, p in layer.experts.named_parameters():
        torch.testing.assert_close(p.grad.full_tensor(), whole.experts.get_parameter(name).grad)


def test_it_is_sharded_by_the_core(two):
    two.run(_sharded)


def _replicated_router(platform):
    """Its gradient would be this rank's part and be called replicated: refused, but without gradients it serves."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    layer = hep.MoE(8, 12, 4, 2)
    wanted = layer(torch.ones(3, 8))
    distribute_module(layer.router, init_device_mesh("cpu", (platform.world_size,), mesh_dim_names=("dp",)))
    with torch.no_grad():
        assert layer(torch.ones(3, 8)).shape == wanted.shape
    with pytest.raises(ValueError, match=r"'gate' of TopKRouter is a DTensor replicated over the mesh dimension 'dp'"):
        layer(torch.ones(3, 8))


def test_a_replicated_router_is_refused(two):
    two.run(_replicated_router)
