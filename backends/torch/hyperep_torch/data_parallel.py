# SPDX-License-Identifier: Apache-2.0
"""``fully_shard``: data parallelism around expert parallelism, with divisors that make a local mean enough.

PyTorch's FSDP2 takes the mean of a gradient over the ranks of its own mesh. That is right for parameters that all data
ranks share. An expert's gradient holds the rows of all ranks of ``ep`` already, and FSDP2 divides it by the ranks of
``efsdp`` alone: it is ``ep`` times too large. Here every gradient is divided by all data ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh as NativeMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.fsdp import fully_shard as native_fully_shard
from torch.distributed.tensor import DTensor, Shard

from hyperep.platform.selection import adopt_mesh
from hyperep_torch.opened import divide_gradients, divides_gradients, opens_all

__all__ = ["fully_shard"]


def fully_shard(
    model: nn.Module,
    mesh: Any,
    *,
    blocks: str | Sequence[str] = (),
    replicate: Sequence[str] = (),
    reshard_after_forward: bool | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
) -> nn.Module:
    """Shard the parameters of *model*, their gradients and their moments over the data ranks, with FSDP2.

    Experts that :class:`hyperep_torch.ExpertParallel` has spread over some dimensions of *mesh* are sharded over the
    others; everything else is sharded over all of them. Every gradient becomes the mean over all ranks of *mesh*: if
    the loss of each rank is a mean over its own tokens, and these are as many on each rank, nothing has to be summed by
    hand.

    Where no other rank has the same experts, FSDP2 would copy their weights before use and their gradients afterwards,
    for nobody; they are kept out of it, unless *mp_policy* or *offload_policy* asks for such a copy.

    Args:
        model: experts are DTensors already; it may be on ``meta``.
        mesh: the data ranks: a torch mesh, or one of hyperep's. Dimensions for anything else (``tp``, ``pp``) are
            sliced off: ``mesh["efsdp", "ep"]``.
        blocks: paths of the parts that are gathered one at a time, as patterns in which a ``*`` stays within its
            segment: ``"layers.*"``.
        replicate: names of the dimensions over which parameters are replicated and only gradients are reduced (HSDP).
        reshard_after_forward: as for FSDP2.
        mp_policy: as for FSDP2.
        offload_policy: as for FSDP2.

    Returns:
        The same model, every parameter of which is a DTensor.

    Raises:
        ValueError: the mesh has no names, a pattern matches nothing, or a policy is given and the mesh has nothing but
            the experts' dimensions. Nothing has been changed then.
    """
    data = _DataRanks(_native(mesh), tuple(replicate))
    patterns = (blocks,) if isinstance(blocks, str) else tuple(blocks)
    parts = dict(model.named_modules())
    matched = {path: p for pattern in patterns for path, p in _matching(pattern, parts)}
    experts = list(_expert_modules(model, data))
    settings: dict[str, Any] = {"reshard_after_forward": reshard_after_forward}
    settings["mp_policy"] = mp_policy or MixedPrecisionPolicy()
    settings["offload_policy"] = offload_policy or OffloadPolicy()
    copies = settings["mp_policy"] != MixedPrecisionPolicy() or type(settings["offload_policy"]) is not OffloadPolicy
    alone = [m for m, dimensions in experts if not copies and _nobody_shares(m, data.sharing(dimensions))]
    shared = [(m, dimensions) for m, dimensions in experts if m not in alone]
    meshes = {dimensions: data.without(dimensions) for _, dimensions in shared}
    for module, _ in experts:
        _require_undivided(module)
    for module in alone:
        divide_gradients(module, data.size)
    for module, dimensions in shared:
        _shard_experts(module, meshes[dimensions], data.size, settings)
    left = {parameter for module in alone for parameter in module.parameters()}
    # From the inside out, as FSDP2 wants it.
    for path in sorted(matched, key=lambda path: -path.count(".")):
        if not isinstance(matched[path], FSDPModule):
            native_fully_shard(matched[path], mesh=data.all, ignored_params=left, **settings)
    if not isinstance(model, FSDPModule):
        native_fully_shard(model, mesh=data.all, ignored_params=left, **settings)
    return model


class _DataRanks:
    """The data ranks, and the meshes that they are arranged in."""

    def __init__(self, mesh: NativeMesh, replicate: tuple[str, ...]) -> None:
        self.names = mesh.mesh_dim_names or ()
        if not self.names or not set(replicate) < set(self.names):
            raise ValueError(
                f"fully_shard needs a mesh with named dimensions, of which replicate={replicate} are some and not all, "
                f"but got {mesh!r}; make one with init_device_mesh(device, shape, mesh_dim_names=...)"
            )
        self._mesh, self._replicate = mesh, replicate
        self.size = mesh.size()
        self.all = self.without(())

    def sharing(self, left_out: tuple[str, ...]) -> int:
        """How many ranks have the same experts, if these are spread over *left_out*."""
        return math.prod(self._mesh.size(n) for n, name in enumerate(self.names) if name not in left_out)

    def without(self, left_out: tuple[str, ...]) -> NativeMesh:
        """The mesh for FSDP2 over all dimensions but some: 1-D, or 2-D with the replicas first."""
        kept = [name for name in self.names if name not in left_out]
        replicas = [name for name in kept if name in self._replicate]
        shards = [name for name in kept if name not in self._replicate]
        if not shards:
            raise ValueError(
                f"fully_shard over {self._mesh!r}: without the experts' dimensions {left_out} no ranks are left to "
                "shard the experts over, which mp_policy and offload_policy are for; give the mesh one more dimension, "
                "of size 1 if need be"
            )
        meshes = [self._flat(tuple(group)) for group in (replicas, shards) if group]
        return meshes[0] if len(meshes) == 1 else _joined(*meshes)

    def _flat(self, names: tuple[str, ...]) -> NativeMesh:
        """A mesh of one dimension that is all of *names*, below the same root, as FSDP2 wants it."""
        return self._mesh[names[0]] if len(names) == 1 else self._mesh[names]._flatten()


def _joined(replicas: NativeMesh, shards: NativeMesh) -> NativeMesh:
    """The mesh ``[replicas, shards]`` of two of one dimension."""
    if hasattr(NativeMesh, "_concatenate"):
        return NativeMesh._concatenate([replicas, shards])
    names = (*(replicas.mesh_dim_names or ()), *(shards.mesh_dim_names or ()))
    return replicas._get_root_mesh()[names]


def _native(mesh: Any) -> NativeMesh:
    if isinstance(mesh, NativeMesh):
        return mesh
    adopted = adopt_mesh(mesh)
    return adopted.platform.native_mesh(adopted)  # type: ignore[attr-defined]


def _matching(pattern: str, parts: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    wanted = pattern.split(".")
    below = [path for path in parts if path]  # the model itself, which "*" matches too, is sharded in any case
    found = [
        path for path in below if len(path.split(".")) == len(wanted) and all(map(fnmatchcase, path.split("."), wanted))
    ]
    if not found:
        near = ", ".join(repr(path) for path in list(parts)[1:4])
        raise ValueError(f"fully_shard: blocks={pattern!r} matches no part of the model; its parts are {near}, ...")
    return ((path, parts[path]) for path in found)


def _expert_modules(module: nn.Module, data: _DataRanks) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """The topmost modules all of whose parameters are spread over the same data ranks, and the names of these.

    Not below what is sharded already: whoever did that has seen to the experts in it.
    """
    spread = {_spread_over(parameter, data.names) for parameter in _unsharded(module)}
    if spread == {()} or not spread:
        return
    if len(spread) == 1:
        yield module, spread.pop()
        return
    if any(_spread_over(parameter, data.names) for parameter in module.parameters(recurse=False)):
        raise ValueError(
            f"fully_shard: in {type(module).__name__} some parameters are spread over data ranks and some are not; "
            "apply the style to a module that holds the experts and nothing else"
        )
    for child in module.children():
        yield from _expert_modules(child, data)


def _unsharded(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters in *module* that FSDP2 does not know."""
    if not isinstance(module, FSDPModule):
        yield from module.parameters(recurse=False)
        for child in module.children():
            yield from _unsharded(child)


def _spread_over(parameter: nn.Parameter, names: Sequence[str]) -> tuple[str, ...]:
    """The dimensions among *names* over which a parameter is a DTensor already."""
    if not isinstance(parameter, DTensor):
        return ()
    return tuple(name for name in parameter.device_mesh.mesh_dim_names or () if name in names)


def _nobody_shares(module: nn.Module, ranks: int) -> bool:
    """Whether FSDP2 can do without experts that *ranks* have: what they are divided by must reach every gradient."""
    return ranks == 1 and opens_all(module)


def _require_undivided(module: nn.Module) -> None:
    if divides_gradients(module):
        raise ValueError(
            "fully_shard divides the gradients of experts itself, and expert_parallelize was told to do so too; say "
            "gradients='sum' there"
        )


def _shard_experts(module: nn.Module, mesh: NativeMesh, ranks: int, settings: dict[str, Any]) -> None:
    shards = mesh.size(mesh.ndim - 1)
    dtypes = {
        settings["mp_policy"].reduce_dtype or settings["mp_policy"].param_dtype or p.dtype for p in module.parameters()
    }
    native_fully_shard(module, mesh=mesh, shard_placement_fn=_placement_over(shards), **settings)
    # gloo has no sum with a factor in it.
    plain_sum = mesh.size() > 1 and dist.get_backend(mesh.get_group(mesh.ndim - 1)) == "gloo"
    module.set_gradient_divide_factor(_factor(ranks, shards, plain_sum, dtypes))
    module.set_force_sum_reduction_for_comms(plain_sum)


def _factor(ranks: int, shards: int, plain_sum: bool, dtypes: set[torch.dtype]) -> float:
    """What FSDP2 must be told, so that it divides by *ranks*.

    Where a single rank is to keep the whole shard, it divides by the factor when it copies, and once more where it
    would have divided around its collective: with a plain sum, and for dtypes that it takes for narrow.
    """
    divides_around = plain_sum or not dtypes <= {torch.float32, torch.bfloat16}
    return ranks**0.5 if shards == 1 and divides_around else float(ranks)


def _placement_over(ranks: int) -> Callable[[nn.Parameter], Shard | None]:
    """Where FSDP2 cuts an expert weight: between experts if that is even, else within them, where it must be even."""

    def placement(parameter: nn.Parameter) -> Shard | None:
        shape = parameter.to_local().shape if isinstance(parameter, DTensor) else parameter.shape
        even = [dim for dim, size in enumerate(shape) if size % ranks == 0]
        return Shard(even[0]) if even else None

    return placement
