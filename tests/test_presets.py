# SPDX-License-Identifier: Apache-2.0
"""The layers of published models: each value has a source, and sizes follow from them."""

import dataclasses
import math

import pytest

from hyperep.loopback import run
from hyperep.moe import PRESETS, LossCoefficients, MoEConfig, RouterConfig, build_moe


def _fields(config, prefix=""):
    """Every setting by dotted path."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        nested = isinstance(value, RouterConfig | LossCoefficients)
        found |= _fields(value, f"{field.name}.") if nested else {prefix + field.name: value}
    return found


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_every_value_that_is_not_a_default_has_a_source(preset):
    # What has no default has a source in any case.
    defaults = _fields(MoEConfig(dim=1, hidden_dim=1, router=RouterConfig(num_experts=1, top_k=1)))
    settings = _fields(preset.config)
    changed = {path for path, value in settings.items() if value != defaults[path]}
    assert changed <= set(preset.sources)
    assert set(preset.sources) <= set(settings)
    assert all(source.strip() for source in preset.sources.values())


LAYERS_AND_BILLIONS = {
    # MoE layers, and parameters of the whole model. Routed experts have layers * E * 3 * D * H of them; a few per cent
    # are left for attention, embeddings, and dense and shared parts.
    "deepseek-v3": (58, 671.0),
    "mixtral-8x7b": (32, 46.7),
    "qwen3-30b-a3b": (48, 30.5),
    "qwen3-235b-a22b": (94, 235.0),
}


@pytest.mark.parametrize("name", PRESETS)
def test_sizes_make_up_the_published_number_of_parameters(name):
    layers, published = LAYERS_AND_BILLIONS[name]
    config = PRESETS[name].config
    routed = layers * config.router.num_experts * 3 * config.dim * config.hidden_dim / 1e9
    assert 0.93 * published < routed < published


@pytest.mark.parametrize("name", PRESETS)
def test_a_scaled_down_layer_keeps_its_routing(name):
    def on_rank(platform):
        config = PRESETS[name].config.scaled_down(num_experts=32)
        layer = build_moe(platform, config)
        sizes = {path: math.prod(parameter.shape) for path, parameter in platform.parameters(layer).items()}
        assert sizes["experts.w1"] == 32 * 16 * 8
        assert ("shared_experts.w1.weight" in sizes) == (name == "deepseek-v3")
        assert (
            dataclasses.replace(config.router, num_experts=PRESETS[name].config.router.num_experts)
            == PRESETS[name].config.router
        )

    run(on_rank, 1)
