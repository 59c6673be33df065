# SPDX-License-Identifier: Apache-2.0
"""Small random models of many architectures of transformers, each with layers of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

__all__ = ["ARCHITECTURES", "FEW", "ONE", "VOCABULARY", "build"]

VOCABULARY = 97

_SMALL: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 16},
    **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    **{"num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8},
    **{"num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "top_k": 2},
    **{"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_shared_experts": 1, "first_k_dense_replace": 0},
    **{"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "shared_intermediate_size": 24},
    **{"decoder_sparse_step": 1, "router_aux_loss_coef": 0.1, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    # What transformers' FSDP2 makes of tied weights has a test of its own.
    "tie_word_embeddings": False,
}
"""What a config has of these is set; every architecture calls things by other names."""

_MLA = {"head_dim": None, "num_key_value_heads": 4}
"""Attention with latent vectors derives the size of its heads."""

_FULL_ATTENTION = {"layer_types": ["full_attention", "full_attention"]}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "aria_text": {},
    "cohere2_moe": {},
    "dbrx": {
        **{"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "dots1": {},
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "glm4_moe": {},
    "glm4_moe_lite": _MLA,
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "laguna": {},
    "jetmoe": {"kv_channels": 8},
    "llama4_text": {"intermediate_size_mlp": 24, "interleave_moe_layer_step": 1, "moe_layers": [0, 1]},
    "longcat_flash": {
        **_MLA,
        "head_dim": 8,
        "num_layers": 1,
        "zero_expert_num": 4,
        "expert_ffn_hidden_size": 24,
        "ffn_hidden_size": 24,
    },
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax": {},
    "minimax_m2": {},
    "mixtral": {},
    "nemotron_h": {},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": _FULL_ATTENTION,
    "qwen3_moe": {},
    "qwen3_next": _FULL_ATTENTION,
    "solar_open": {},
}
"""By transformers' own name, what is to be set besides; ``None`` leaves something as it is by default."""

FEW = ("dbrx", "deepseek_v3", "gpt_oss", "jetmoe", "llama4_text", "longcat_flash", "nemotron_h", "qwen3_moe")
"""One of each form of experts, and of weights: see ``hyperep_torch.transformers.forms``."""


ONE = ("qwen3_moe",)
"""For what is the same in all."""


def build(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A random model of the architecture *name*, in float32: the same for each seed."""
    of = CONFIG_MAPPING[name]
    known = {*of().to_dict(), *getattr(of, "attribute_map", {})}
    small = {key: value for key, value in {**_SMALL, **ARCHITECTURES[name], **changes}.items() if key in known}
    config = of(**{key: value for key, value in small.items() if value is not None})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        # So large that every expert, and every choice, counts in what the tests compare.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.3 * parameter.shape[-1] ** -0.5)
    return model.eval()
