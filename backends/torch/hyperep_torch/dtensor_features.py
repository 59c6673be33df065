# SPDX-License-Identifier: Apache-2.0
"""DTensors as inputs of the linear styles, and their outputs as DTensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as NativeShard

from hyperep.mesh import DeviceMesh
from hyperep.placements import Placement, Shard
from hyperep_torch.dtensor_tokens import same_ranks
from hyperep_torch.sharded import to_native_placement

__all__ = ["ColwiseLayout", "RowwiseLayout"]


@dataclass(frozen=True)
class _FeatureLayout:
    style: str
    mesh: DeviceMesh

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def refused(self, x: DTensor, rule: str) -> ValueError:
        """Sharded tokens too: over ``tp`` gradients are summed, and all ranks must have the same."""
        return ValueError(
            f"{self.style}: the input is a DTensor of shape {tuple(x.shape)} that lies as {list(x.placements)} over "
            f"{x.device_mesh}, but it must lie over {self.mesh}, {rule}; redistribute it so, as by "
            "x.redistribute(placements=[Replicate()])"
        )


@dataclass(frozen=True)
class ColwiseLayout(_FeatureLayout):
    """Replicated in; out sharded in the last dim, of as many parts as the weight has."""

    parts: int

    def call(self, inner: Callable[..., Any], x: Any, *inputs: Any, **kwargs: Any) -> Any:
        """Call the module with this rank's part."""
        if not isinstance(x, DTensor):
            return inner(x, *inputs, **kwargs)
        if not same_ranks(x, self.mesh) or list(x.placements) != [Replicate()]:
            raise self.refused(x, "replicated")
        out = inner(x.to_local(), *inputs, **kwargs)
        return _made(out, x, Shard(out.ndim - 1, parts=self.parts))


@dataclass(frozen=True)
class RowwiseLayout(_FeatureLayout):
    """Sharded in the last dim; a replicated input is cut there, since a rank has weights for its features alone."""

    output: Placement

    def call(self, inner: Callable[..., Any], x: Any, *inputs: Any, **kwargs: Any) -> Any:
        """Call the module with this rank's features."""
        if not isinstance(x, DTensor):
            return inner(x, *inputs, **kwargs)
        features = NativeShard(x.ndim - 1)
        if not same_ranks(x, self.mesh) or x.placements[0] not in (Replicate(), features):
            raise self.refused(x, "sharded in the last dim, or replicated")
        return _made(inner(x.redistribute(placements=[features]).to_local(), *inputs, **kwargs), x, self.output)


def _made(out: Any, x: DTensor, placement: Placement) -> DTensor:
    return DTensor.from_local(out, x.device_mesh, [to_native_placement(placement)], run_check=False)
