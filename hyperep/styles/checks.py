# SPDX-License-Identifier: Apache-2.0
"""What styles check before they change anything."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hyperep.agreement import require_agreement
from hyperep.distribute import is_laid_out, own_parameters
from hyperep.mesh import DeviceMesh
from hyperep.placements import Placement
from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.errors import UnsupportedCapability
from hyperep.platform.protocol import Module, Parameter, Platform
from hyperep.sharding import described, whole_shape

__all__ = [
    "LaidOut",
    "UnlikeWeights",
    "note_applied",
    "require_alike",
    "require_experts",
    "require_layouts",
    "require_mesh",
    "require_support",
    "warn_of_unlike",
]

LaidOut = Callable[[str, Module], Mapping[str, Sequence[Placement]]]
"""How a style lays out the parameters that belong to a part of a module itself, from its path and the part."""

_APPLIED = "_hyperep_style"
"""Attribute of a module: the style that was applied to it, or to one above it."""

_SAMPLE = 16
"""Numbers of each parameter that ranks compare: enough to tell draws apart, and nothing to copy to the host."""


class UnlikeWeights(UserWarning):
    """Ranks made a module with different weights, and what no style splits stays different."""


def require_mesh(style: str, mesh: DeviceMesh, names: tuple[str, ...]) -> DeviceMesh:
    """Check the dimensions of a mesh; one without names goes by order.

    Raises:
        ValueError: another number of dimensions, or other names.
    """
    wanted = "[" + ", ".join(names) + "]"
    if mesh.ndim != len(names) or mesh.mesh_dim_names not in (None, names):
        raise ValueError(
            f"{style} needs a {len(names)}-D mesh {wanted}, but got {mesh}; make one with init_device_mesh(platform, "
            f"shape, {names}), or take a sub-mesh by its names"
        )
    if mesh.mesh_dim_names is None:
        groups = [mesh.get_group(d) for d in range(mesh.ndim)]
        return DeviceMesh(mesh.platform, mesh.ranks, names, groups, mesh.native)
    return mesh


def require_support(platform: Platform[Any], capability: Capability, hint: str) -> None:
    """Check that the platform has what only some ranks will use, so that the others do not wait for them.

    Raises:
        UnsupportedCapability: on all ranks, before anything is changed.
    """
    if platform.capabilities.get(capability, Support.UNSUPPORTED) is Support.UNSUPPORTED:
        raise UnsupportedCapability(platform.name, capability, hint)


def require_alike(style: str, module: Module, mesh: DeviceMesh, settings: Sequence[str] = ()) -> None:
    """Check that all ranks apply one style to modules of one form, before anything is checked on each rank alone.

    Raises:
        ValueError: on all ranks, if parameters or buffers have other names, shapes or dtypes on one.
    """
    platform = mesh.platform
    tensors = [*platform.parameters(module).items(), *platform.buffers(module).items()]
    form = [f"{name!r}, {described(platform, tensor)}{_layout(tensor, mesh)}" for name, tensor in tensors]
    require_agreement(mesh, style, (style, *settings, *form))


def warn_of_unlike(style: str, module: Module, mesh: DeviceMesh) -> None:
    """Tell ranks that drew other weights, by a warning on all of them where the style is applied. Collective.

    The shards are parts of the first rank's, so what is split is right; but whoever made these weights differently made
    a router that no style touches so too.
    """
    if mesh.size() == 1:
        return
    other = require_agreement(mesh, style, (), _sample(mesh.platform.parameters(module), mesh))
    if other is not None:
        warnings.warn(
            UnlikeWeights(
                f"{style}: rank {other} has other weights than rank {int(mesh.ranks.flat[0])}, whose parts all ranks "
                "get now. What is not split, such as a router, stays different on each rank unless it is broadcast or "
                "loaded. Make the same modules in the same order on all ranks, or give each its seed"
            ),
            stacklevel=3,
        )


def _layout(tensor: Any, mesh: DeviceMesh) -> str:
    """What ranks must have in common of how a parameter or buffer lies, where it is distributed already."""
    sharding = mesh.platform.sharding(tensor)
    if sharding is None:
        return ""
    where = "the ranks of the style" if np.array_equal(sharding.mesh.ranks, mesh.ranks) else "other ranks"
    return f", laid out as {list(sharding.placements)} over {where}"


def _sample(parameters: Mapping[str, Parameter], mesh: DeviceMesh) -> bytes:
    """The first numbers of each parameter that is whole and has values."""
    platform = mesh.platform
    whole = [platform.local(p) for p in parameters.values() if platform.sharding(p) is None]
    # A tensor that is nowhere yet (as on PyTorch's meta device) is on no device of the platform.
    rows = [x for x in whole if platform.is_tensor(x) and len(x.shape) and 0 not in tuple(x.shape)]
    if not rows:
        return b""
    for i, row in enumerate(rows):
        while len(row.shape) > 1:
            row = row[0]
        rows[i] = platform.stop_gradient(row[:_SAMPLE])
    return b"".join(np.ascontiguousarray(row).tobytes() for row in platform.to_host(*rows))


def require_experts(
    style: str, module: Module, mesh: DeviceMesh, laid_out: LaidOut, settings: Sequence[str] = ()
) -> int:
    """The number of experts of a module, from the first dim of its parameters; checked before anything is changed.

    Raises:
        ValueError: on all ranks, there are no parameters, they disagree on dim 0, one is distributed already in another
            way than *laid_out* says, or a rank has others.
    """
    require_alike(style, module, mesh, settings)
    parameters = mesh.platform.parameters(module)
    if not parameters:
        raise ValueError(f"{style}: the module has no parameters; apply the style to the module that holds the experts")
    require_layouts(style, mesh.platform.named_modules(module), mesh, laid_out)
    shapes = {name: whole_shape(mesh.platform, parameter) for name, parameter in parameters.items()}
    numbers = {shape[0] for shape in shapes.values() if len(shape) > 1}
    features = {size for shape in shapes.values() for size in shape[1:]}
    flat = {shape for shape in shapes.values() if len(shape) < 2}
    if len(numbers) != 1 or any(shape != (*numbers,) for shape in flat) or (flat and numbers & features):
        raise ValueError(
            f"{style}: dim 0 of every parameter must be the expert, the same number for all, but the shapes are "
            f"{shapes}; apply the style to the experts, not to the layer around them. A number for each expert is "
            "[experts], or [experts, 1] where there are as many features as experts"
        )
    return int(numbers.pop())


def require_layouts(style: str, parts: Mapping[str, Module], mesh: DeviceMesh, laid_out: LaidOut) -> None:
    """Check that no parameter of *parts* is distributed yet; or if one is, as the style would do it.

    Raises:
        ValueError: one is distributed in another way, or by a style that was applied before.
    """
    platform = mesh.platform
    applied = any(getattr(part, _APPLIED, None) for part in parts.values())
    for path, part in parts.items():
        for name, parameter in own_parameters(platform, part).items():
            sharding = platform.sharding(parameter)
            if sharding is None:
                continue
            if applied or not is_laid_out(platform, parameter, mesh, laid_out(path, part).get(name, ())):
                whole = f"{path}.{name}" if path else name
                raise ValueError(
                    f"{style}: parameter {whole!r} is distributed already, as {list(sharding.placements)}; a style is "
                    "applied once, to a module with whole parameters or with parameters that lie over its mesh as it "
                    "would lay them out, and before data parallelism"
                )


def note_applied(style: str, module: Module, mesh: DeviceMesh) -> None:
    """Note on *module* that a style was applied to it: shards look alike, whoever made them."""
    for part in mesh.platform.named_modules(module).values():
        setattr(part, _APPLIED, style)
