# SPDX-License-Identifier: Apache-2.0
"""Stock models with their experts spread over ranks are the same models."""

import architectures
import cases
import hyperep_torch
import peft
import pytest
from hyperep_torch.platform import join
from hyperep_torch.transformers.find import find_experts
from torch import nn
from torch.distributed.tensor import DTensor

import hyperep


@pytest.mark.parametrize(
    ("experts", "told"),
    [
        (
            lambda: nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]),
            r"'layer.experts': ModuleList with 0.weight \(4, 4\)",
        ),
        (lambda: nn.Identity(), "has no experts that could be spread"),
    ],
    ids=["a list", "none"],
)
def test_what_is_not_known_is_refused_by_name(experts, told):
    model = nn.ModuleDict({"layer": nn.ModuleDict({"experts": experts()})})
    with pytest.raises(ValueError, match=told):
        find_experts(model)


def test_a_number_of_experts_that_the_ranks_do_not_divide(two):
    two.run(cases.not_divisible)


def _adapted(name, *parameters):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=list(parameters))
    return peft.get_peft_model(architectures.build(name), config)


@pytest.mark.parametrize(
    ("model", "parameter", "told"),
    [
        ("gpt_oss", "mlp.experts.down_proj_bias", r"'down_proj_bias' of GptOssExperts, of shape \(8, 32\)"),
        ("longcat_flash", "mlp.experts.down_proj", "are not spread for experts of its form .WithZeros"),
        ("llama4_text", "feed_forward.experts.down_proj", "are not spread for experts of its form .Unrouted"),
    ],
)
def test_adapters_that_cannot_be_spread_are_refused(model, parameter, told):
    with pytest.raises(ValueError, match=told + ".*target_parameters"):
        find_experts(_adapted(model, parameter))


@pytest.mark.parametrize(
    ("style", "names"),
    [
        (hyperep_torch.ExpertParallel(chunks=2), ("ep",)),
        (hyperep_torch.ExpertParallel(balance=hyperep.Balance()), ("ep",)),
        (hyperep_torch.ExpertParallel(levels=("node", "ep")), ("node", "ep")),
        (hyperep_torch.ExpertTensorParallel(colwise=("gate_up_proj",), rowwise=("down_proj",)), ("ep", "tp")),
        (hyperep_torch.TensorParallel(colwise=("gate_up_proj",), rowwise=("down_proj",)), ("tp",)),
    ],
    ids=["chunks", "balance", "levels", "slices of experts", "slices"],
)
def test_styles_that_do_not_spread_adapters(style, names):
    experts = _adapted("qwen3_moe", "mlp.experts.down_proj").base_model.model.model.layers[0].mlp.experts
    mesh = hyperep.init_device_mesh(join(device="cpu"), (1,) * len(names), names)
    with pytest.raises(ValueError, match=r"adapters of peft on (their|its) own parameters"):
        style.apply(experts, mesh)
    assert not any(isinstance(parameter, DTensor) for parameter in experts.parameters())
