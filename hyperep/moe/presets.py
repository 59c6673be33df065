# SPDX-License-Identifier: Apache-2.0
"""The mixture-of-experts layers of published models, with the source of each value.

"HF" is the key of the model's ``config.json`` on Hugging Face. Values that a model does not use are the defaults of
:class:`hyperep.moe.MoEConfig`, which switch the feature off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hyperep.moe.config import LossCoefficients, MoEConfig, RouterConfig

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The layer of a published model."""

    model: str
    config: MoEConfig
    sources: Mapping[str, str]
    """Where each value that is not a default comes from; fields of the router and the losses by dotted path."""


DEEPSEEK_V3 = Preset(
    model="deepseek-ai/DeepSeek-V3",
    config=MoEConfig(
        dim=7168,
        hidden_dim=2048,
        router=RouterConfig(
            num_experts=256,
            top_k=8,
            score_function="sigmoid",
            route_scale=2.5,
            num_groups=8,
            top_groups=4,
            expert_bias=True,
        ),
        num_shared_experts=1,
        losses=LossCoefficients(sequence=0.0001),
        expert_bias_update_rate=0.001,
    ),
    sources={
        "dim": "arXiv:2412.19437, 4.2; HF hidden_size",
        "hidden_dim": "arXiv:2412.19437, 4.2; HF moe_intermediate_size",
        "router.num_experts": "arXiv:2412.19437, 4.2; HF n_routed_experts",
        "router.top_k": "arXiv:2412.19437, 4.2; HF num_experts_per_tok",
        "router.score_function": "arXiv:2412.19437, 2.1.2, eq. 15; HF scoring_func",
        "router.normalize": "arXiv:2412.19437, 2.1.2, eq. 13; HF norm_topk_prob",
        "router.route_scale": "HF routed_scaling_factor",
        "router.num_groups": "HF n_group",
        "router.top_groups": "arXiv:2412.19437, 4.2 (each token is sent to at most 4 nodes); HF topk_group",
        "router.expert_bias": "arXiv:2412.19437, 2.1.2, eq. 16; HF topk_method noaux_tc",
        "num_shared_experts": "arXiv:2412.19437, 4.2; HF n_shared_experts",
        "losses.sequence": "arXiv:2412.19437, 4.2 (balance factor alpha)",
        "expert_bias_update_rate": "arXiv:2412.19437, 4.2 (gamma, for the first 14.3T tokens; 0 after them)",
    },
)

MIXTRAL_8X7B = Preset(
    model="mistralai/Mixtral-8x7B-v0.1",
    config=MoEConfig(
        dim=4096,
        hidden_dim=14336,
        router=RouterConfig(num_experts=8, top_k=2),
        losses=LossCoefficients(batch=0.02 * 2),
    ),
    sources={
        "dim": "arXiv:2401.04088, table 1; HF hidden_size",
        "hidden_dim": "arXiv:2401.04088, table 1; HF intermediate_size",
        "router.num_experts": "arXiv:2401.04088, table 1; HF num_local_experts",
        "router.top_k": "arXiv:2401.04088, table 1; HF num_experts_per_tok",
        "router.score_function": "arXiv:2401.04088, 2.1 (softmax over the chosen logits, the same after normalisation)",
        "router.normalize": "arXiv:2401.04088, 2.1",
        "losses.batch": "HF router_aux_loss_coef, times top_k: see hyperep.moe.losses",
    },
)

QWEN3_30B_A3B = Preset(
    model="Qwen/Qwen3-30B-A3B",
    config=MoEConfig(
        dim=2048,
        hidden_dim=768,
        router=RouterConfig(num_experts=128, top_k=8),
        losses=LossCoefficients(global_batch=0.001 * 8),
    ),
    sources={
        "dim": "HF hidden_size",
        "hidden_dim": "HF moe_intermediate_size",
        "router.num_experts": "arXiv:2505.09388, 2; HF num_experts",
        "router.top_k": "arXiv:2505.09388, 2; HF num_experts_per_tok",
        "router.score_function": "transformers, Qwen3MoeSparseMoeBlock",
        "router.normalize": "HF norm_topk_prob",
        "losses.global_batch": (
            "arXiv:2505.09388, 2 (global-batch load balancing loss); HF router_aux_loss_coef, times top_k: see "
            "hyperep.moe.losses"
        ),
    },
)

QWEN3_235B_A22B = Preset(
    model="Qwen/Qwen3-235B-A22B",
    config=MoEConfig(
        dim=4096,
        hidden_dim=1536,
        router=RouterConfig(num_experts=128, top_k=8),
        losses=LossCoefficients(global_batch=0.001 * 8),
    ),
    sources=QWEN3_30B_A3B.sources,
)

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "deepseek-v3": DEEPSEEK_V3,
        "mixtral-8x7b": MIXTRAL_8X7B,
        "qwen3-30b-a3b": QWEN3_30B_A3B,
        "qwen3-235b-a22b": QWEN3_235B_A22B,
    }
)
"""By name. Build one with ``build_moe(platform, PRESETS[name].config)``."""
