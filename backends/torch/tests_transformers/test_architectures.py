# SPDX-License-Identifier: Apache-2.0
"""Stock models with their experts spread over ranks are the same models."""

import pathlib
import re

import architectures
import cases
import peft
import pytest
from hyperep_torch.transformers.find import find_experts
from torch import nn


def test_losses_and_gradients(ranks, architecture):
    ranks.run(cases.losses_and_gradients, architecture)


def test_the_page_lists_what_is_tested():
    page = pathlib.Path(__file__).parents[3].joinpath("docs", "transformers.md").read_text()
    listed = page[page.index("## Architectures") :].split("\n\n")[2]
    assert re.findall(r"`(\w+)`", listed) == sorted(architectures.ARCHITECTURES)


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


def test_adapters_on_the_experts_are_refused():
    adapted = peft.get_peft_model(
        architectures.build("qwen3_moe"),
        peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]),
    )
    with pytest.raises(ValueError, match=r"mlp.experts.base_layer' is wrapped by peft.*out of target_parameters"):
        find_experts(adapted)
