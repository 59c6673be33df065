# SPDX-License-Identifier: Apache-2.0
"""The second door: any model of transformers that is there, its experts spread over ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from hyperep.platform.selection import adopt_mesh
from hyperep.styles.expert import Exchange
from hyperep_torch.adapters import spread
from hyperep_torch.opened import divide_gradients
from hyperep_torch.styles import ExpertParallel
from hyperep_torch.transformers.find import StockExperts, find_experts
from hyperep_torch.transformers.forms import Declared
from hyperep_torch.transformers.kernels import EXPERTS_IMPLEMENTATION
from hyperep_torch.wrapped import wrap_forward

__all__ = ["Gradients", "expert_parallelize"]

Gradients = Literal["mean", "sum"]


def expert_parallelize(
    model: nn.Module,
    mesh: Any,
    *,
    gradients: Gradients = "mean",
    exchange: Exchange = "tokens",
    levels: Sequence[str] = ("ep",),
    experts_implementation: str | None = EXPERTS_IMPLEMENTATION,
) -> nn.Module:
    """Spread the experts of *model* over the ranks of *mesh*, in place; nothing else in it changes.

    Experts are found by what they are made of. Each rank keeps ``E / R`` of each layer's, as DTensors, and tokens
    travel to them. ``DistributedDataParallel`` leaves these parameters to their owners, whether it is around the model
    already or comes afterwards.

    Args:
        model: from a config or loaded, with whole experts that are the same on all ranks. Before data parallelism, the
            optimizer; after peft's adapters.
        mesh: 1-D over the ranks that share the experts, or one dimension for each level: torch's or hyperep's.
        gradients: what the gradients of all other parameters become. ``"mean"``: their mean over the ranks of the mesh,
            as ``DistributedDataParallel`` and the Trainer make of a loss that is a mean over a rank's own tokens; the
            experts', which arrive summed over all ranks' tokens, are divided by the number of ranks. ``"sum"``: their
            sum; or ``hyperep_torch.fully_shard``, which divides by itself, comes afterwards.
        exchange: what travels, see :class:`hyperep_torch.ExpertParallel`.
        levels: mesh dimensions over which experts are split, from the slowest link to the fastest.
        experts_implementation: how experts are computed that ask transformers' registry: by hyperep's grouped products.
            ``None`` leaves it as it is.

    Returns:
        The same model.

    Raises:
        ValueError: experts of a form that is not known, none at all, a number of them that the ranks do not divide, or
            another word for *gradients*. Nothing has been changed then.
    """
    if gradients not in ("mean", "sum"):
        raise ValueError(f"gradients={gradients!r}: choose 'mean' or 'sum'")
    style = ExpertParallel(exchange=exchange, levels=levels)
    adopted = adopt_mesh(mesh)
    ranks = math.prod(adopted.size(name) for name in style.levels) if adopted.ndim > 1 else adopted.size()
    found = find_experts(model)
    for experts in found:
        if experts.wrappers and len(style.levels) > 1:
            raise ValueError(
                f"{experts.outer!r} has adapters of peft on its own parameters, which are spread over one level, and "
                f"not over {style.levels}; choose one, or leave the experts out of target_parameters"
            )
        if experts.num_experts % ranks:
            raise ValueError(
                f"{experts.path!r} has {experts.num_experts} experts, which {ranks} ranks do not divide; choose a "
                f"number of ranks that divides {experts.num_experts}"
            )
    for experts in found:
        _spread(experts, experts.form.style(exchange, levels), mesh, ranks, experts_implementation)
        if gradients == "mean":
            divide_gradients(experts.wrappers[0] if experts.wrappers else experts.module, ranks)
    _hide_from_ddp(model, found)
    return model


def _spread(experts: StockExperts, style: ExpertParallel, mesh: Any, ranks: int, implementation: str | None) -> None:
    module, form = experts.module, experts.form
    form.prepare(module, experts.block)
    # With rows, where they can be taken, because their number is known where the exchange ends.
    declared = isinstance(form, Declared)
    module.takes = "tokens" if declared and implementation != EXPERTS_IMPLEMENTATION else form.takes
    style.apply(module, mesh)
    spread(experts.wrappers, module)
    if (wrapper := form.around(experts.num_experts)) is not None:
        wrap_forward(module, wrapper)
    # What their own forward, and transformers' other implementations, go by.
    module.num_experts = experts.num_experts // ranks
    module._is_expert_parallel = True
    if declared and implementation is not None:
        module.config._experts_implementation = implementation


def _hide_from_ddp(model: nn.Module, found: Sequence[StockExperts]) -> None:
    hidden = {
        f"{experts.outer}.{name}"
        for experts in found
        for name, _ in (*experts.wrappers, experts.module)[0].named_parameters()
    }
    already = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    model._ddp_params_and_buffers_to_ignore = sorted({*already, *hidden})
