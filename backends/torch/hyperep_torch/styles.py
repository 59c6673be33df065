# SPDX-License-Identifier: Apache-2.0
"""The core's parallel styles as styles of PyTorch, and PyTorch's styles among the core's.

Each class here is both a ``hyperep.ParallelStyle`` and a ``torch.distributed.tensor.parallel.ParallelStyle``: it serves
in either ``parallelize_module``. What it does is what the core's style of the same name does; see ``docs/styles.md``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh as NativeMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import parallel as native

import hyperep
from hyperep.mesh import DeviceMesh
from hyperep.placements import Replicate
from hyperep.platform.selection import adopt_mesh
from hyperep_torch.adapters import require_spreadable, spread, unwrapped
from hyperep_torch.dtensor_features import ColwiseLayout, RowwiseLayout
from hyperep_torch.dtensor_tokens import TokenLayout
from hyperep_torch.sharded import to_native_placement
from hyperep_torch.uncompiled import call_uncompiled
from hyperep_torch.wrapped import wrap_forward

__all__ = [
    "BorrowedStyle",
    "ColwiseParallel",
    "ExpertParallel",
    "ExpertTensorParallel",
    "RowwiseParallel",
    "TensorParallel",
    "parallelize_module",
]


class _StyleOfTorch(native.ParallelStyle):
    """Mixed in before a style of the core: what PyTorch's ``parallelize_module`` calls, on PyTorch's meshes."""

    mesh_dim_names: tuple[str, ...]

    def _apply(self, module: nn.Module, device_mesh: NativeMesh) -> nn.Module:
        return self.apply(module, device_mesh)

    def apply(self, module: nn.Module, mesh: NativeMesh | DeviceMesh) -> nn.Module:
        """Distribute *module*, in place, and return it; see the core's style.

        Args:
            module: as the core's style wants it.
            mesh: a mesh with the style's dimensions. One of a single dimension may call it anything, and one with more
                dimensions than the style has is sliced.

        Raises:
            ValueError: ``src_data_rank`` is another one than 0, or as for the core's style.
        """
        self._require_usable(module)
        named = _with_names(adopt_mesh(mesh), self.mesh_dim_names)
        module = super().apply(module, named)  # type: ignore[misc]
        layout = self._inputs(named)
        wrap_forward(module, layout.call)
        if isinstance(layout, TokenLayout):
            layout.note(module)
        return module

    def check(self, module: nn.Module, mesh: NativeMesh | DeviceMesh) -> None:
        """Raise what :meth:`apply` would, and change nothing."""
        self._require_usable(module)
        super().check(module, _with_names(adopt_mesh(mesh), self.mesh_dim_names))  # type: ignore[misc]

    def _require_usable(self, module: nn.Module) -> None:
        if unwrapped(module)[0]:
            raise ValueError(
                f"{type(self).__name__}: the module has adapters of peft on its own parameters, which ExpertParallel "
                "alone spreads"
            )
        if isinstance(module, nn.ModuleList) and isinstance(self, hyperep.BaseExpertParallel | hyperep.TensorParallel):
            raise ValueError(
                f"{type(self).__name__}: the module is a list of {len(module)} modules, and experts are one module "
                "whose parameters have the expert in dim 0; make it one with hyperep_torch.stack_experts(the list)"
            )
        on_meta = all(parameter.is_meta for parameter in module.parameters())
        if self.src_data_rank != 0 and not on_meta:
            raise ValueError(
                f"{type(self).__name__}: src_data_rank={self.src_data_rank}, but shards are parts of what the first "
                "rank of the mesh holds; leave it at 0, or make the module on meta and its weights afterwards"
            )

    def _inputs(self, mesh: DeviceMesh) -> TokenLayout | ColwiseLayout | RowwiseLayout:
        """How inputs may lie that are DTensors."""
        raise NotImplementedError


def _with_names(mesh: DeviceMesh, names: tuple[str, ...]) -> DeviceMesh:
    """*mesh* with the dimensions that a style wants, if that is possible; else as it is, for the style to refuse."""
    if mesh.mesh_dim_names == names:
        return mesh
    if mesh.ndim == len(names) == 1:
        return DeviceMesh(mesh.platform, mesh.ranks, names, [mesh.get_group()], mesh.native)
    if set(names) < set(mesh.mesh_dim_names or ()):
        return mesh[names]
    return mesh


def _summed(output_layout: Any) -> Any:
    """PyTorch's placement of what slices give: replicated, unless the caller adds up."""
    return to_native_placement(output_layout or Replicate())


class _ExchangingStyle(_StyleOfTorch):
    """A style under which tokens travel: for a compiler, its module is one call that is left as it is."""

    chunks: Any
    balance: Any
    levels: tuple[str, ...]

    def _inputs(self, mesh: DeviceMesh) -> TokenLayout:
        return TokenLayout(type(self).__name__, mesh, len(self.levels), _summed(None))

    def apply(self, module: nn.Module, mesh: NativeMesh | DeviceMesh) -> nn.Module:
        wrappers, experts = unwrapped(module)
        if wrappers:
            self._require_no_more_than_ranks()
            require_spreadable(wrappers, experts)
            self.apply(experts, mesh)
            spread(wrappers, experts)
            return module
        module = super().apply(module, mesh)
        if self.chunks != 1 or self.balance is not None:
            # An argument and not part of the closure, so that a deep copy looks at itself.
            wrap_forward(module, functools.partial(_refuse_gathered_parts, module))
        wrap_forward(module, call_uncompiled)
        return module

    def check(self, module: nn.Module, mesh: NativeMesh | DeviceMesh) -> None:
        wrappers, experts = unwrapped(module)
        if wrappers:
            self._require_no_more_than_ranks()
            require_spreadable(wrappers, experts)
        super().check(experts if wrappers else module, mesh)

    def _require_no_more_than_ranks(self) -> None:
        if len(self.mesh_dim_names) > 1 or self.chunks != 1 or self.balance is not None:
            raise ValueError(
                f"{type(self).__name__} over {self.mesh_dim_names}, chunks={self.chunks}, {self.balance}: the experts "
                "have adapters of peft on their own parameters, which are spread by ExpertParallel over one mesh "
                "dimension, without chunks and balance; choose that, or leave the experts out of target_parameters"
            )


def _refuse_gathered_parts(
    module: nn.Module, inner: Callable[..., Any], *inputs: Any, meanwhile: nn.Module | None = None, **kwargs: Any
) -> Any:
    """Refuse modules below the experts, or beside them, that FSDP2 gathers by themselves.

    Their parameters are others while they are called than those that the schedule knows, and would get no gradient.
    """
    parts = {f"experts.{path}": part for path, part in module.named_modules() if path}
    if meanwhile is not None:
        parts |= {f"meanwhile.{path}".rstrip("."): part for path, part in meanwhile.named_modules()}
    gathered = [path for path, part in parts.items() if isinstance(part, FSDPModule)]
    if gathered:
        raise ValueError(
            f"ExpertParallel in chunks or balanced: FSDP2 gathers the parameters of {gathered} by themselves, so that "
            "their gradients would be lost; let the experts, or the block around them, be gathered as one, or "
            "leave out chunks and balance"
        )
    extra = {} if meanwhile is None else {"meanwhile": meanwhile}
    return inner(*inputs, **extra, **kwargs)


class ExpertParallel(_ExchangingStyle, hyperep.ExpertParallel):
    """Each rank owns ``E / R`` experts; tokens travel to them.

    Example:
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> import hyperep_torch as hep
        >>> plan = {"layers.*.moe.experts": hep.ExpertParallel()}
        >>> parallelize_module(model, mesh["ep"], plan)  # doctest: +SKIP
    """


class TensorParallel(_StyleOfTorch, hyperep.TensorParallel):
    """Every rank holds a slice of every expert; tokens are replicated and do not travel."""

    def _inputs(self, mesh: DeviceMesh) -> TokenLayout:
        return TokenLayout(type(self).__name__, mesh, 0, _summed(self.slices.output_layout))


class ExpertTensorParallel(_ExchangingStyle, hyperep.ExpertTensorParallel):
    """Experts are split over ``ep``, and each of them is sliced over ``tp``."""

    def _inputs(self, mesh: DeviceMesh) -> TokenLayout:
        return TokenLayout(type(self).__name__, mesh, len(self.levels), _summed(self.slices.output_layout))


class ColwiseParallel(_StyleOfTorch, hyperep.ColwiseParallel):
    """Each rank holds some rows of a linear module's weight, and computes some features of the output."""

    def _inputs(self, mesh: DeviceMesh) -> ColwiseLayout:
        return ColwiseLayout(type(self).__name__, mesh, self._shard.parts)


class RowwiseParallel(_StyleOfTorch, hyperep.RowwiseParallel):
    """Each rank holds some columns of a linear module's weight, and computes one term of the output."""

    def _inputs(self, mesh: DeviceMesh) -> RowwiseLayout:
        return RowwiseLayout(type(self).__name__, mesh, self.output_layout or Replicate())


class BorrowedStyle(hyperep.ParallelStyle):
    """A style of PyTorch's own, for the core's plans. It wants a mesh of one dimension, ``tp`` where there are more."""

    mesh_dim_names = ("tp",)

    def __init__(self, style: native.ParallelStyle) -> None:
        self.style = style

    def apply(self, module: nn.Module, mesh: Any) -> nn.Module:
        """Apply the style to *module* on PyTorch's own mesh."""
        self.check(module, mesh)
        adopted = adopt_mesh(mesh)
        return self.style._apply(module, adopted.platform.native_mesh(adopted))

    def check(self, module: nn.Module, mesh: Any) -> None:
        """Raise where the mesh is another, or where the style is for other modules."""
        adopted = adopt_mesh(mesh)
        if adopted.ndim != 1:
            raise ValueError(
                f"{type(self.style).__name__} is PyTorch's and wants a mesh of one dimension, but got {adopted}; name "
                "the one for it 'tp', or give it its own sub-mesh"
            )
        sliced = isinstance(self.style, native.ColwiseParallel | native.RowwiseParallel)
        if sliced and not isinstance(module, nn.Linear | nn.Embedding):
            raise NotImplementedError(
                f"{type(self.style).__name__} is PyTorch's and serves nn.Linear and nn.Embedding, but the module is a "
                f"{type(module).__name__}"
            )


def parallelize_module(module: nn.Module, mesh: Any, plan: Any) -> nn.Module:
    """:func:`hyperep.parallelize_module`; a plan may mix hyperep's styles and PyTorch's."""
    return hyperep.parallelize_module(module, mesh, plan)
