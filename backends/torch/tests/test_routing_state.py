# SPDX-License-Identifier: Apache-2.0
"""The expert bias stays float32 whatever its layer is cast to, loaded from or wrapped in."""

import copy
import io

import hyperep_torch
import pytest
import torch

from hyperep.moe import MoEConfig, RouterConfig, build_moe, update_expert_bias

CASTS = {
    "to": lambda layer: layer.to(torch.bfloat16),
    "to, by name": lambda layer: layer.to(dtype=torch.float16),
    "to a tensor's": lambda layer: layer.to(torch.zeros(1, dtype=torch.bfloat16)),
    "half": lambda layer: layer.half(),
    "bfloat16": lambda layer: layer.bfloat16(),
    "double": lambda layer: layer.double(),
    "type": lambda layer: layer.type(torch.bfloat16),
    "inside a model": lambda layer: torch.nn.Sequential(torch.nn.Linear(8, 8), layer).to(torch.bfloat16)[1],
    "copied": lambda layer: copy.deepcopy(layer).to(torch.bfloat16),
}


@pytest.fixture(params=["neutral", "native"])
def make(request, platform):
    """Makes layers of the core, and such as are classes of PyTorch."""
    router = RouterConfig(num_experts=4, top_k=2, expert_bias=True)
    config = MoEConfig(dim=8, hidden_dim=4, router=router)

    def make(bias=None):
        layer = build_moe(platform, config) if request.param == "neutral" else hyperep_torch.MoE.of(config)
        if bias is not None:
            platform.assign(layer.router.expert_bias, torch.tensor(bias))
        return layer

    return make


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_small_steps_are_kept(platform, make, cast):
    """1500 steps of 0.001 make 1.5; in bfloat16 they stop at 0.5."""
    layer = cast(make())
    assert layer.router.gate.dtype == layer.experts.w1.dtype != torch.float32
    counts = torch.tensor([0, 4, 2, 2])
    for _ in range(1500):
        update_expert_bias(platform, layer, counts, 0.001)
    torch.testing.assert_close(layer.router.expert_bias, torch.tensor([1.5, -1.5, 0.0, 0.0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_no_digit_is_lost(make, cast):
    """A cast there and back would keep the dtype, and not the digits."""
    bias = [0.1, 1.001, -1.003, 0.0]
    assert torch.equal(cast(make(bias)).router.expert_bias, torch.tensor(bias))


def test_a_state_dict_goes_round(make):
    layer = make([0.1, 1.001, -1.003, 0.0]).to(torch.bfloat16)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file)
    other = make().to(torch.bfloat16)
    other.load_state_dict(saved)
    assert torch.equal(other.router.expert_bias, layer.router.expert_bias)
    assert other.router.expert_bias.dtype == torch.float32


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_of_a_narrower_dtype_is_widened(make, assign):
    state = {name: value.bfloat16() for name, value in make([0.1, 1.0, -1.0, 0.0]).state_dict().items()}
    layer = make()
    layer.load_state_dict(state, assign=assign)
    assert layer.router.expert_bias.dtype == torch.float32
    assert torch.equal(layer.router.expert_bias, state["router.expert_bias"].float())
    assert layer.router.gate.dtype == (torch.bfloat16 if assign else torch.float32)


def test_a_buffer_moves_and_does_not_join_the_weights(make):
    layer = make([0.1, 1.001, -1.003, 0.0])
    moved = copy.deepcopy(layer).to("meta", torch.bfloat16)
    assert (moved.router.expert_bias.device.type, moved.router.expert_bias.dtype) == ("meta", torch.float32)
    assert moved.to_empty(device="cpu").router.expert_bias.dtype == torch.float32
    assert [name for name, _ in layer.named_buffers()] == ["router.expert_bias"]


def test_the_choice_uses_every_digit(make):
    """Biases that bfloat16 cannot tell apart, and float32 can, decide between equal scores."""
    layer = make([1.0, 1.001, 1.002, 1.003]).to(torch.bfloat16)
    with torch.no_grad():
        layer.router.gate.zero_()
    routing = layer.router(torch.ones(1, 8, dtype=torch.bfloat16))
    assert routing.experts.tolist() == [[3, 2]]
