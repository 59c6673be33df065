# SPDX-License-Identifier: Apache-2.0
"""The model: a decoder-only transformer over bytes, whose feed-forward layers are mixtures of experts.

Every part is a native module of the platform. Initial weights come from one NumPy generator, in one order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hyperep.moe import MoE, MoEStats
from hyperep.platform.protocol import Module, Platform
from hyperep.train.attention import Attention
from hyperep.train.norm import RMSNorm
from hyperep.train.settings import VOCABULARY, Settings

__all__ = ["LanguageModel", "expert_modules"]


def LanguageModel(platform: Platform[Any], settings: Settings) -> Module:  # noqa: N802 (it makes modules, as a class would)
    """Make the model that *settings* describe.

    Returns:
        A module called with int64 tokens ``[B, L]``, ``L <= seq_len``. It returns logits ``[B * L, 256]``, and of each
        layer what its experts' layer knows beside its output.
    """
    rng = np.random.default_rng(settings.seed)
    xp = platform.xp
    dim = settings.dim
    # A small output layer makes the first loss that of a uniform guess, ln 256.
    scales = {"embedding": 1.0, "head": 0.02}
    weights = {name: rng.normal(scale=s, size=(VOCABULARY, dim)).astype(np.float32) for name, s in scales.items()}
    names = [f"layer{i}" for i in range(settings.layers)]
    children = {name: _Layer(platform, settings, rng) for name in names} | {"norm": RMSNorm(platform, dim)}

    def forward(m: Any, tokens: Any) -> tuple[Any, list[MoEStats]]:
        sequences, length = tokens.shape
        x = xp.take(m.embedding, xp.reshape(tokens, (sequences * length,)), axis=0)  # [T, D]
        stats = []
        for name in names:
            x, known = getattr(m, name)(x, sequences)
            stats.append(known)
        logits = xp.matmul(m.norm(x), xp.permute_dims(m.head, (1, 0)))  # [T, 256]
        return logits, stats

    parameters = {name: platform.from_host(weight) for name, weight in weights.items()}
    description = f"dim={dim}, layers={settings.layers}, vocabulary={VOCABULARY}"
    return platform.make_module("LanguageModel", parameters, forward, children=children, description=description)


def expert_modules(platform: Platform[Any], model: Module) -> dict[str, Module]:
    """The modules of experts in a model, by path: what a parallel style is applied to."""
    return {path: part for path, part in platform.named_modules(model).items() if path.split(".")[-1] == "experts"}


def _Layer(platform: Platform[Any], settings: Settings, rng: np.random.Generator) -> Module:  # noqa: N802
    """A pre-norm layer: attention and experts, each added to what it read. ``[T, D] -> [T, D]``, and statistics."""
    children = {
        "attention_norm": RMSNorm(platform, settings.dim),
        "attention": Attention(platform, settings.dim, settings.heads, settings.seq_len, rng),
        "moe_norm": RMSNorm(platform, settings.dim),
        "moe": MoE(platform, settings.dim, settings.hidden, settings.experts, settings.top_k, seed=rng),
    }

    def forward(m: Any, x: Any, sequences: int) -> tuple[Any, MoEStats]:
        x = x + m.attention(m.attention_norm(x), sequences)
        y, stats = m.moe(m.moe_norm(x), with_stats=True)
        return x + y, stats

    return platform.make_module("Layer", {}, forward, children=children)
