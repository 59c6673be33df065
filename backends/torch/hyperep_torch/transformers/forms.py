# SPDX-License-Identifier: Apache-2.0
"""The forms in which models keep their experts, and what makes each of them one that can be spread.

=================== =================================================================================================
form                what it is
=================== =================================================================================================
:class:`Declared`   a class that asks transformers' registry, as nearly all do: weights with the expert in dim 0, called
                    as ``experts(hidden_states, top_k_index, top_k_weights)``
:class:`Called`     called so too, and computed by its own forward
:class:`Flat`       DBRX: three weights ``[E F, D]``, in which an expert's rows follow one another's
:class:`Unrouted`   Llama 4: every expert is called with every token, weighted before and mostly by zero
:class:`Sized`      JetMoE: a linear map for each expert, called with rows that are sorted already
:class:`WithZeros`  LongCat-Flash: experts beyond the weights return what they get
=================== =================================================================================================

:meth:`prepare` changes a module before it is spread, and nothing but how it is called and how its weights are cut: what
the model computes stays the same, and :mod:`hyperep_torch.transformers.saving` writes weights in their old shapes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import hyperep
from hyperep.exchange.routed import routed_from_rows
from hyperep.exchange.rows import combine
from hyperep.mesh import DeviceMesh
from hyperep.styles.expert import Exchange
from hyperep_torch.full_state import SAVED_AS
from hyperep_torch.grouped import grouped_matmul
from hyperep_torch.styles import ExpertParallel
from hyperep_torch.transformers.kernels import declares_its_layout, experts_forward

__all__ = ["FORMS", "Called", "Declared", "Form"]

_BOTH = ("tokens", "rows")


class Form:
    """One of the forms; none has any state."""

    takes: str | tuple[str, ...] = "tokens"
    """How the prepared module is called, see ``hyperep.styles.calls``."""

    def count(self, module: nn.Module) -> int | None:
        """How many experts *module* holds, or ``None`` if it is not of this form."""
        raise NotImplementedError

    def prepare(self, module: nn.Module, block: nn.Module | None) -> None:
        """Make *module* one that can be spread; *block* is what holds it."""

    def style(self, exchange: Exchange, levels: Sequence[str]) -> ExpertParallel:
        """What spreads the module."""
        return ExpertParallel(exchange=exchange, levels=levels)

    def choices(self, routing: Any, number: int) -> torch.Tensor:
        """int64 ``[E]``: how many choices each of *number* experts gets, from the second input of a call."""
        # Beyond the experts is nobody.
        return torch.bincount(routing.detach().reshape(-1).clamp(max=number), minlength=number + 1)[:number]

    def around(self, number: int) -> Callable[..., Any] | None:
        """What is done with inputs and output outside the style, ``wrapper(inner, *inputs)``; there are *number*."""
        return None


class Called(Form):
    """Experts that are called with tokens and compute them by their own forward."""

    def count(self, module: nn.Module) -> int | None:
        """From the parameters, because the attribute is the number of this rank's once experts are spread."""
        if not hasattr(module, "num_experts") or not _takes_tokens(module):
            return None
        number = _common_first_dim(module)
        spread = any(isinstance(parameter, DTensor) for parameter in module.parameters())
        return number if number == module.num_experts or spread else None


class Declared(Called):
    """Experts whose class asks transformers' registry how they are computed."""

    takes = _BOTH

    def count(self, module: nn.Module) -> int | None:
        """The number, if the layout of the weights is declared too."""
        return super().count(module) if declares_its_layout(module) else None


class Flat(Form):
    """DBRX: weights of all experts below one another, ``[E F, D]``, in a child module; called with tokens of 3 dims."""

    takes = _BOTH

    def count(self, module: nn.Module) -> int | None:
        """The number that the module declares, if its weights are as many rows."""
        number, size = getattr(module, "num_experts", None), getattr(module, "ffn_hidden_size", None)
        weights = dict(getattr(module, "mlp", nn.Module()).named_parameters(recurse=False))
        if not isinstance(number, int) or not isinstance(size, int) or weights.keys() != {"w1", "v1", "w2"}:
            return None
        shapes = {tuple(weight.shape[:-1]) for weight in weights.values()}
        return number if shapes in ({(number * size,)}, {(number, size)}) else None

    def prepare(self, module: nn.Module, block: nn.Module | None) -> None:
        """Give the expert a dim of its own."""
        for name, weight in list(module.mlp.named_parameters(recurse=False)):
            cut = weight.detach().unflatten(0, (module.num_experts, -1))
            setattr(module.mlp, name, nn.Parameter(cut, weight.requires_grad))
        flat = functools.partial(torch.flatten, start_dim=0, end_dim=1)
        setattr(module.mlp, SAVED_AS, dict.fromkeys(("w1", "v1", "w2"), flat))
        _replace_forward(module, _dbrx)

    def around(self, number: int) -> Callable[..., Any]:
        """Tokens come with their batch."""
        return _with_flat_tokens


class Unrouted(Form):
    """Llama 4: tokens are weighted before the experts, and each expert is called with all of them."""

    takes = _BOTH

    def count(self, module: nn.Module) -> int | None:
        """From the weights ``[E, D, 2 F]`` and ``[E, F, D]``."""
        weights = dict(module.named_parameters())
        if weights.keys() != {"gate_up_proj", "down_proj"} or (_inputs(module) != 1 and not _is_prepared(module)):
            return None
        return _common_first_dim(module)

    def prepare(self, module: nn.Module, block: nn.Module | None) -> None:
        """Choose the experts whose score is not zero, and call these alone."""
        if block is None or not all(hasattr(block, name) for name in ("router", "top_k", "shared_expert")):
            raise ValueError(
                f"{type(module).__name__} stands in {type(block).__name__}, which has no router, top_k and "
                "shared_expert; experts that are called with all tokens are known in Llama 4's block alone"
            )
        module.has_gate, module.has_bias, module.is_transposed, module.is_concatenated = True, False, True, True
        _replace_forward(module, experts_forward)
        block.__class__ = _routing_class(type(block))


class Sized(Form):
    """JetMoE: one linear map for each expert, called as ``experts(rows, sizes)``; both of a block exchange rows."""

    takes = "rows"

    def count(self, module: nn.Module) -> int | None:
        """From the weight ``[E, out, in]``."""
        weights = dict(module.named_parameters())
        named = [p.name for p in inspect.signature(type(module).forward).parameters.values()]
        if weights.keys() != {"weight"} or (named[-1:] != ["expert_size"] and not _is_prepared(module)):
            return None
        return _common_first_dim(module)

    def prepare(self, module: nn.Module, block: nn.Module | None) -> None:
        """Compute it by one grouped product."""
        _replace_forward(module, lambda m, rows, sizes: grouped_matmul(rows, m.weight, sizes))

    def style(self, exchange: Exchange, levels: Sequence[str]) -> ExpertParallel:
        """One whose rows come back in another width."""
        return _ExpertLinear(levels=levels)

    def choices(self, routing: Any, number: int) -> torch.Tensor:
        """The sizes themselves."""
        return torch.as_tensor(routing, dtype=torch.int64)

    def around(self, number: int) -> Callable[..., Any]:
        """Sizes come as a list."""
        return _with_sizes_on_device


class WithZeros(Form):
    """LongCat-Flash: ``gate_up_proj`` has an entry for each zero expert too, which nothing reads."""

    takes = _BOTH

    def count(self, module: nn.Module) -> int | None:
        """The number of those that compute something."""
        number = getattr(module, "num_routed_experts", None)
        if not isinstance(number, int) or not hasattr(module, "zero_expert_num") or module.gate_up_proj is None:
            return None
        return number

    def prepare(self, module: nn.Module, block: nn.Module | None) -> None:
        """Keep the weights that are read; the others go into checkpoints as they are."""
        whole = module.gate_up_proj.detach()
        number = module.num_routed_experts
        module.gate_up_proj = nn.Parameter(whole[:number].clone(), module.gate_up_proj.requires_grad)
        rest = whole[number:].clone()
        setattr(
            module, SAVED_AS, {"gate_up_proj": functools.partial(_followed_by, rest if rest.is_meta else rest.cpu())}
        )
        module.has_gate, module.has_bias, module.is_transposed, module.is_concatenated = True, False, False, True
        _replace_forward(module, experts_forward)

    def around(self, number: int) -> Callable[..., Any]:
        """Zero experts stay at home, and to the others they are nobody."""
        return functools.partial(_with_zero_experts, number=number)


class _ExpertLinear(ExpertParallel):
    """Rows go out with the features that the weight ``[E, out, in]`` takes, and come back with those that it gives."""

    def _token_combine(self, module: nn.Module, routed_output: Any, mesh: DeviceMesh, context: Any) -> Any:
        return combine(routed_output, context, row_shape=module.weight.shape[1:2])


FORMS: tuple[Form, ...] = (Declared(), WithZeros(), Flat(), Sized(), Unrouted(), Called())


def _common_first_dim(module: nn.Module) -> int | None:
    sizes = {parameter.shape[0] if parameter.ndim > 1 else 0 for parameter in module.parameters()}
    number = sizes.pop() if len(sizes) == 1 else 0
    return number if number > 1 else None


def _takes_tokens(module: nn.Module) -> bool:
    """Whether its forward takes three inputs, of which the last two route the first."""
    if _is_prepared(module):
        return "tokens" in module.takes
    given = [p.name for p in inspect.signature(type(module).forward).parameters.values() if p.name != "self"]
    return len(given) == 3 and given[1].endswith(("index", "indices")) and given[2].endswith("weights")


def _is_prepared(module: nn.Module) -> bool:
    return hasattr(module, "takes")


def _inputs(module: nn.Module) -> int:
    return len(inspect.signature(type(module).forward).parameters) - 1


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """In place of the forward of its class, which is called with this rank's parts."""
    module._own_forward = forward


def _dbrx(m: Any, x: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
    def by_row(rows: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        gate, up = grouped_matmul(rows, m.mlp.w1, sizes), grouped_matmul(rows, m.mlp.v1, sizes)
        return grouped_matmul(m.mlp.activation_fn(gate) * up, m.mlp.w2.transpose(1, 2), sizes)

    if len(routing) == 1:
        return by_row(x, *routing)
    return routed_from_rows(hyperep.get_platform("torch"), by_row, m.mlp.w1.shape[0])(x, *routing)


def _with_flat_tokens(inner: Callable[..., Any], tokens: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
    return inner(tokens.reshape(-1, tokens.shape[-1]), *routing).view_as(tokens)


def _with_sizes_on_device(inner: Callable[..., Any], rows: torch.Tensor, sizes: Any) -> torch.Tensor:
    return inner(rows, torch.as_tensor(sizes, dtype=torch.int64, device=rows.device))


def _with_zero_experts(
    inner: Callable[..., Any], tokens: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, *, number: int
) -> torch.Tensor:
    kept = torch.where(indices >= number, weights, torch.zeros_like(weights)).sum(1, keepdim=True)
    return inner(tokens, indices.clamp(max=number), weights) + (tokens * kept).to(tokens.dtype)


def _followed_by(rest: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    return torch.cat([whole, rest.to(whole)])


class _Routing:
    """Mixed in before Llama 4's block: what it computes, of the experts that were chosen alone."""

    def forward(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The block's output, and the router's logits."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores, logits = self.router(tokens)  # [T, E], zero where an expert was not chosen
        weights, chosen = scores.topk(self.top_k, dim=1)
        # The weight goes into the experts, so that each choice is a token of its own.
        rows = (tokens[:, None] * weights[:, :, None]).flatten(0, 1)
        done = self.experts(rows, chosen.reshape(-1, 1), torch.ones_like(weights).reshape(-1, 1))
        return self.shared_expert(tokens) + done.view(-1, self.top_k, done.shape[-1]).sum(1), logits


@functools.cache
def _routing_class(cls: type) -> type:
    return type(cls.__name__, (_Routing, cls), {})
