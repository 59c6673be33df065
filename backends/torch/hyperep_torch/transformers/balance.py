# SPDX-License-Identifier: Apache-2.0
"""The load-balancing loss of transformers' models, over the tokens of all ranks instead of one rank's.

Balance over a small batch keeps experts from specialising (arXiv:2501.11873); over the global one it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hyperep.moe import Routing, global_load_balancing_loss
from hyperep.platform.selection import adopt_mesh

__all__ = ["global_balance_loss"]


def global_balance_loss(
    router_logits: Sequence[torch.Tensor],
    mesh: Any,
    *,
    top_k: int,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """This rank's part of the auxiliary loss that a stock model would compute of all ranks' tokens at once. Collective.

    The mean of the parts over the ranks is that loss, exactly, also where ranks have different numbers of tokens; and
    the mean of the ranks' gradients, as data parallelism makes it, is its gradient. All layers count together, as they
    do in transformers, whose loss is *top_k* when the load is balanced. Give the model no loss of its own beside it:
    ``model.config.router_aux_loss_coef = 0``.

    Args:
        router_logits: what the model returns as ``router_logits``, with ``output_router_logits=True``: of each layer
            ``[T, E]``, before the softmax.
        mesh: 1-D over the ranks that have different tokens: torch's or hyperep's.
        top_k: experts that are chosen for each token, ``config.num_experts_per_tok``.
        attention_mask: the model's own, ``[B, S]``: tokens where it is zero are padding, and do not count.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: there are no logits, or the mask has another number of tokens. On this rank alone, before anything
            is exchanged.

    Example:
        >>> out = model(**inputs, output_router_logits=True)  # doctest: +SKIP
        >>> loss = out.loss + 0.001 * global_balance_loss(out.router_logits, mesh, top_k=4)  # doctest: +SKIP
    """
    if not router_logits:
        raise ValueError(
            "router_logits is empty; call the model with output_router_logits=True and give what it returns"
        )
    tokens, num_experts = router_logits[0].shape
    if attention_mask is not None and attention_mask.numel() != tokens:
        raise ValueError(
            f"attention_mask has {attention_mask.numel()} tokens, but router_logits {tokens}; give the mask that the "
            "model was called with"
        )
    mesh, device = adopt_mesh(mesh), router_logits[0].device  # layers may be on several
    # All layers are one routing of so many tokens more; what is padding has chosen nobody.
    logits = torch.cat([of_layer.to(device) for of_layer in router_logits]).float()
    scores = logits.softmax(dim=-1)
    weights, chosen = scores.topk(top_k, dim=-1)
    real = None
    if attention_mask is not None:
        real = (attention_mask.reshape(tokens).to(device) != 0).repeat(len(router_logits))
        chosen = chosen.masked_fill(~real[:, None], num_experts)
    routing = Routing(experts=chosen, scores=weights, probabilities=scores, logits=logits, mask=real)
    return top_k * global_load_balancing_loss(mesh.platform, routing, mesh)
