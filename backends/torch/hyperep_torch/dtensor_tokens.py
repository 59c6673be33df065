# SPDX-License-Identifier: Apache-2.0
"""DTensors as the tokens of a sharded layer: computed on this rank's part, and given back in their own layout.

Tokens that are sharded lie as a layer wants them: each rank has its own. Of replicated ones each rank takes its part,
because all ranks would send the same tokens, and the gradients of experts would be as many times too large.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from hyperep.mesh import DeviceMesh

__all__ = ["TokenLayout", "call_layer", "same_ranks"]

_LAYOUT = "_hyperep_tokens"
"""Attribute of experts: how their tokens may lie."""


@dataclass(frozen=True)
class TokenLayout:
    """How the tokens of experts that a style has sharded may lie as DTensors."""

    style: str
    """As errors name it."""
    mesh: DeviceMesh
    levels: int
    """Over so many mesh dimensions, the first ones, each rank has its own tokens; over the others all have the same."""
    output: Any
    """How the result lies over the others."""

    def note(self, experts: nn.Module) -> None:
        """Note it on *experts*, for the layer around them."""
        experts.__dict__[_LAYOUT] = self

    def call(self, inner: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Any:
        """Call experts with rows and counts, or with tokens, indices and weights."""
        if not any(isinstance(x, DTensor) for x in inputs):
            return inner(*inputs, **kwargs)
        x, *routing = inputs
        if not isinstance(x, DTensor):
            raise ValueError(
                f"{self.style}: the experts were called with plain tokens or rows, but with DTensors beside them; give "
                "DTensors of one layout, or to_local() of each where it is about this rank's tokens"
            )
        opened = self.opened(x, 1)
        if len(routing) == 1:
            routed = [self._own_counts(opened, *routing)]
        else:
            routed = [opened.inward(tensor) for tensor in routing]
        if self.levels:
            kwargs.pop("rows", None)  # the number of all choices, and not of this rank's
        return opened.outward(inner(opened.inward(x), *routed, **kwargs))

    def opened(self, x: DTensor, token_dims: int) -> _Opened:
        """What becomes of inputs that lie as *x*, whose first *token_dims* dims are those of tokens.

        Raises:
            ValueError: it lies otherwise than tokens may; on all ranks.
        """
        split = [p for p, size in zip(x.placements[: self.levels], x.device_mesh.shape, strict=False) if size > 1]
        own = all(type(p) is Shard and p.dim < token_dims for p in split)
        whole = all(isinstance(p, Replicate) for p in split)
        rest = all(isinstance(p, Replicate) for p in x.placements[self.levels :])
        if not same_ranks(x, self.mesh) or not rest or not (own or whole):
            raise ValueError(self._refused(x, token_dims))
        return _Opened(x, token_dims, self.levels, self.output, cut=whole and bool(split))

    def _refused(self, x: DTensor, token_dims: int) -> str:
        dims = "dim 0" if token_dims == 1 else "a dim of tokens, any but the last"
        names = list(map(repr, self.mesh.mesh_dim_names or range(self.mesh.ndim)))
        rules = [f"over {', '.join(names[: self.levels])} sharded in {dims}, or replicated"] if self.levels else []
        rules += [f"over {', '.join(names[self.levels :])} replicated"] if names[self.levels :] else []
        return (
            f"{self.style}: the tokens are a DTensor of shape {tuple(x.shape)} that lies as {list(x.placements)} over "
            f"{x.device_mesh}, but it must lie over {self.mesh}, {' and '.join(rules)}; redistribute it so, or give "
            "x.to_local() where that is what this rank is to compute"
        )

    def _own_counts(self, opened: _Opened, counts: torch.Tensor) -> torch.Tensor:
        """How many of this rank's rows each expert gets. Plain counts beside sharded rows are this rank's already."""
        if isinstance(counts, DTensor):
            if not same_ranks(counts, self.mesh) or not all(isinstance(p, Replicate) for p in counts.placements):
                raise ValueError(
                    f"{self.style}: tokens_per_expert lies as {list(counts.placements)} over {counts.device_mesh}; as "
                    f"a DTensor it is the counts of all rows, replicated over {self.mesh}; or give a plain tensor of "
                    "this rank's"
                )
            counts = counts.to_local()
        elif not opened.cut:
            return counts
        start, stop = opened.bounds()
        ends = counts.cumsum(0)
        return (ends.clamp(start, stop) - (ends - counts).clamp(start, stop)).to(counts.dtype)

    def line(self) -> set[int]:
        """The ranks that have other tokens than this one."""
        here = self.mesh.get_coordinate() or ()
        lines = self.mesh.ranks[(*(slice(None),) * self.levels, *here[self.levels :])]
        return set(lines.ravel().tolist()) - {int(self.mesh.ranks[here])}

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenLayout:
        return self


@dataclass(frozen=True)
class _Opened:
    """What becomes of the inputs and the output of one call."""

    x: DTensor
    token_dims: int
    levels: int
    output: Any
    cut: bool
    """Whether a rank takes its part of replicated tokens."""

    @property
    def _flat(self) -> bool:
        """Whole entries of dim 0, such as sequences, stay together where that gives all ranks as many."""
        return self.cut and self.token_dims != 1 and (not self.token_dims or self.x.shape[0] % self._ranks != 0)

    @property
    def _ranks(self) -> int:
        return math.prod(self.x.device_mesh.shape[: self.levels])

    @property
    def _inner(self) -> list[Any]:
        """The placements with which is computed."""
        used = [Shard(0)] * self.levels if self.cut else self.x.placements[: self.levels]
        return [*used, *self.x.placements[self.levels :]]

    def inward(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of *tensor*, which has the dims of tokens and others; a plain one lies as the tokens do."""
        x, lead = self.x, self.token_dims
        if isinstance(tensor, DTensor):
            if tensor.placements != x.placements or not np.array_equal(tensor.device_mesh.mesh, x.device_mesh.mesh):
                raise ValueError(
                    f"a DTensor beside the tokens lies as {list(tensor.placements)} over {tensor.device_mesh}, but the "
                    f"tokens as {list(x.placements)} over {x.device_mesh}; redistribute one of them"
                )
        elif not self.cut:
            return tensor
        else:
            if tensor.shape[:lead] != x.shape[:lead]:
                raise ValueError(
                    f"a tensor of shape {tuple(tensor.shape)} beside replicated tokens of shape {tuple(x.shape)}: its "
                    "first dims must be those of all tokens"
                )
            tensor = DTensor.from_local(tensor, x.device_mesh, x.placements, run_check=False)
        if self._flat:
            tensor = tensor.reshape(math.prod(x.shape[:lead]), *tensor.shape[lead:])
        return tensor.redistribute(placements=self._inner).to_local()

    def outward(self, out: torch.Tensor) -> DTensor:
        """The DTensor whose part this rank has computed, laid out as the tokens are."""
        x, rest = self.x, [self.output] * (self.x.device_mesh.ndim - self.levels)
        lead = (math.prod(x.shape[: self.token_dims]),) if self._flat else x.shape[: self.token_dims]
        features = out.shape[len(lead) :]
        shape = torch.Size((*lead, *features))
        whole = {"shape": shape, "stride": torch.empty(shape, device="meta").stride()}
        placements = [*self._inner[: self.levels], *rest]
        result = DTensor.from_local(out.contiguous(), x.device_mesh, placements, run_check=False, **whole)
        result = result.redistribute(placements=[*x.placements[: self.levels], *rest])
        return result.reshape(*x.shape[: self.token_dims], *features) if self._flat else result

    def bounds(self) -> tuple[int, int]:
        """Where this rank's part of dim 0 begins and ends; PyTorch's parts are all of one size but the last ones."""
        start, stop = 0, int(self.x.shape[0])
        mesh = self.x.device_mesh
        for dimension, placement in enumerate(self._inner):
            if isinstance(placement, Shard):
                part = -(-(stop - start) // mesh.size(dimension))
                start = min(start + mesh.get_local_rank(dimension) * part, stop)
                stop = min(start + part, stop)
        return start, stop


def call_layer(
    layer: nn.Module, experts: nn.Module, forward: Callable[..., Any], x: DTensor, *, mask: Any = None, **kwargs: Any
) -> Any:
    """Call the *forward* of a *layer* around *experts* with this rank's part of *x* ``[..., D]`` and of its mask.

    Raises:
        ValueError: on all ranks, tokens may not lie so; or another part of the layer is sharded over the same ranks.
    """
    layout = next((p.__dict__[_LAYOUT] for p in experts.modules() if _LAYOUT in p.__dict__), None)
    if layout is None:
        raise ValueError(
            f"{type(layer).__name__} was called with a DTensor, {list(x.placements)} over {x.device_mesh}, but its "
            "experts are under no style of hyperep_torch; apply one over that mesh, or give x.to_local()"
        )
    opened = layout.opened(x, x.ndim - 1)
    _require_whole(layer, experts, layout)
    result = forward(opened.inward(x), mask=None if mask is None else opened.inward(mask), **kwargs)
    if isinstance(result, tuple):
        out, *others = result
        return opened.outward(out), *others
    return opened.outward(result)


def _require_whole(layer: nn.Module, experts: nn.Module, layout: TokenLayout) -> None:
    """Tensor parallelism adds up over its ranks what belongs to the same tokens."""
    inside, others = set(experts.modules()), layout.line()
    for path, part in layer.named_modules():
        if part in inside or getattr(part, "_is_fsdp_managed_module", False):
            continue
        for name, parameter in part.named_parameters(recurse=False):
            if isinstance(parameter, DTensor) and others & _sharers(parameter):
                raise ValueError(
                    f"{type(layer).__name__}: {path}.{name} is sharded over ranks that each have their own tokens, as "
                    f"experts over {layout.mesh} have; leave it whole, or shard it over another mesh dimension"
                )


def _sharers(parameter: DTensor) -> set[int]:
    """The ranks among which a parameter is cut."""
    mesh, found = parameter.device_mesh, set()
    for dimension, placement in enumerate(parameter.placements):
        if not isinstance(placement, Replicate):
            found |= set(dist.get_process_group_ranks(mesh.get_group(dimension)))
    return found


def same_ranks(x: DTensor, mesh: DeviceMesh) -> bool:
    """Whether *x* lies over the ranks of *mesh*, whatever the dimensions are called."""
    return np.array_equal(x.device_mesh.mesh, mesh.ranks)
