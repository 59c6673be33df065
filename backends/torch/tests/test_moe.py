# SPDX-License-Identifier: Apache-2.0
"""The mixture-of-experts layer against plain NumPy, on torch: the core's neutral cases."""

import sys
from pathlib import Path

import pytest
import torch

from hyperep.moe import build_moe

sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "neutral"))
import moe_cases
from measure import fill_weights


@pytest.mark.parametrize("name", moe_cases.CONFIGS)
def test_layer_agrees_with_numpy(platform, name):
    moe_cases.layer_agrees(platform, name)


@pytest.mark.parametrize("name", ["softmax", "groups and bias", "shared", "capacity by probability", "deepseek-v3"])
def test_no_tokens(platform, name):
    moe_cases.no_tokens(platform, name)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_losses_agree_with_numpy(platform, score_function):
    moe_cases.losses_agree(platform, score_function)


def test_top_1_trains_the_router(platform):
    moe_cases.top_1_trains_the_router(platform)


def test_global_loss_is_that_of_all_ranks(two):
    two.run(moe_cases.global_loss_agrees)


def test_global_loss_is_that_of_its_mesh(four):
    four.run(moe_cases.global_loss_agrees, (5, 1), 2)


def test_expert_bias_follows_the_load_of_its_group(four):
    four.run(moe_cases.bias_follows_the_load_of_its_group)


def test_tokens_of_any_number_of_dims(platform):
    moe_cases.tokens_of_any_number_of_dims(platform)


def test_expert_bias_follows_the_load_of_all_ranks(two):
    two.run(moe_cases.bias_follows_the_load)


def test_capacity_under_expert_parallelism(two):
    two.run(moe_cases.capacity_under_expert_parallelism, "capacity by probability")


@pytest.mark.parametrize("name", ["deepseek-v3", "capacity by probability"])
def test_bfloat16(platform, name):
    """A layer in bfloat16 routes in float32 and agrees with the float32 one to bfloat16's precision."""
    layer = build_moe(platform, moe_cases.CONFIGS[name])
    fill_weights(platform, layer)
    rounded = build_moe(platform, moe_cases.CONFIGS[name]).to(torch.bfloat16)
    rounded.load_state_dict(layer.state_dict())
    layer.load_state_dict(rounded.state_dict())  # the same values in both
    x = torch.randn(20, moe_cases.DIM, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).requires_grad_()
    wide = x.detach().float().requires_grad_()
    out, stats = rounded(x, with_stats=True)
    expected, wide_stats = layer(wide, with_stats=True)
    assert (out.dtype, stats.routing.logits.dtype, stats.routing.scores.dtype) == (torch.bfloat16, *[torch.float32] * 2)
    assert torch.equal(stats.routing.experts, wide_stats.routing.experts)
    out.float().square().sum().backward()
    expected.square().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    for value, wanted in ((out, expected), (x.grad, wide.grad), (rounded.router.gate.grad, layer.router.gate.grad)):
        assert (value.float() - wanted).abs().max() < 0.04 * wanted.abs().max()


def test_autocast(platform):
    """Under autocast experts, shared ones too, compute in bfloat16, and the router in float32 all the same."""
    layer = build_moe(platform, moe_cases.CONFIGS["deepseek-v3"])
    fill_weights(platform, layer)
    x = torch.randn(20, moe_cases.DIM, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = layer(x, with_stats=True)[1].routing
    seen = {}
    for name in ("experts", "shared_experts"):
        getattr(layer, name).register_forward_hook(
            lambda module, inputs, out, name=name: seen.update({name: out.dtype})
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, stats = layer(x, with_stats=True)
    assert seen == {"experts": torch.bfloat16, "shared_experts": torch.bfloat16}
    for field in ("logits", "scores", "probabilities", "experts"):
        assert torch.equal(getattr(stats.routing, field), getattr(expected, field)), field
    out.float().square().sum().backward()
    assert layer.router.gate.grad.abs().max() > 0.01
    assert x.grad.dtype == torch.float32
