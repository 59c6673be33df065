# SPDX-License-Identifier: Apache-2.0
"""Turn whole tensors, parameters and modules into distributed ones (the names of ``torch.distributed.tensor``)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hyperep.agreement import require_agreement
from hyperep.mesh import DeviceMesh
from hyperep.placements import Placement
from hyperep.platform.protocol import Module
from hyperep.platform.selection import adopt_mesh
from hyperep.sharding import Sharding, described, shard_tensor

__all__ = [
    "distribute_module",
    "distribute_parameter",
    "distribute_tensor",
    "is_laid_out",
    "lay_out",
    "own_buffers",
    "own_parameters",
]


def distribute_tensor(tensor: Any, mesh: DeviceMesh, placements: Sequence[Placement]) -> Any:
    """The framework's distributed tensor of *tensor*, as the first rank of the mesh holds it.

    Collective over the mesh.

    Args:
        tensor: a whole tensor, of one shape on all ranks.
        mesh: a hyperep mesh or a native one.
        placements: one for each dimension of the mesh.

    Returns:
        In PyTorch a ``DTensor``; on platforms without such a type a :class:`hyperep.sharding.ShardedTensor`.

    Raises:
        ValueError: on all ranks, the number of placements is wrong, a sharded dim does not exist or does not divide, or
            a rank was given another shape, dtype or placement than the first one.
        TypeError: *tensor* belongs to another platform or device, or is sparse.
    """
    mesh = adopt_mesh(mesh)
    platform = mesh.platform
    usable = platform.is_tensor(tensor)
    kind = (
        f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        if usable
        else f"a {type(tensor).__module__}.{type(tensor).__qualname__}"
    )
    require_agreement(mesh, "distribute_tensor", (kind, f"placements {list(placements)}"))
    sharding = Sharding(mesh, tuple(placements))
    if not usable:
        raise TypeError(
            f"distribute_tensor got {kind}, which is no tensor of platform {platform.name!r} that is dense and on its "
            f"device {platform.device}; use platform.from_host, or a mesh of the tensor's platform"
        )
    return platform.from_local(shard_tensor(tensor, sharding), sharding)


def distribute_parameter(module: Module, name: str, mesh: DeviceMesh, placements: Sequence[Placement]) -> None:
    """Replace the direct parameter or buffer *name* of *module* by its shard. Collective over the mesh.

    Raises:
        ValueError: the module has no such parameter or buffer itself, it is distributed already, or as for
            :func:`distribute_tensor`.
    """
    mesh = adopt_mesh(mesh)
    platform = mesh.platform
    parameters = {**own_buffers(platform, module), **own_parameters(platform, module)}
    kind = described(platform, parameters[name]) if name in parameters else f"none of {sorted(parameters)}"
    require_agreement(mesh, f"distribute_parameter of {name!r}", (kind, f"placements {list(placements)}"))
    if name not in parameters:
        raise ValueError(f"the module has no parameter {name!r} of its own; it has {sorted(parameters)}")
    sharding = Sharding(mesh, tuple(placements))
    parameter = parameters[name]
    current = platform.sharding(parameter)
    if current is not None:
        raise ValueError(
            f"parameter {name!r} is distributed already, as {list(current.placements)} over {current.mesh}; a parallel "
            "style is applied once, to a module that holds whole parameters, and before any data-parallel wrapper"
        )
    platform.shard_parameter(module, name, shard_tensor(platform.local(parameter), sharding), sharding)


def is_laid_out(platform: Any, tensor: Any, mesh: DeviceMesh, placements: Sequence[Placement]) -> bool:
    """Whether a parameter or buffer lies over the ranks of *mesh* already, as *placements* say."""
    current = platform.sharding(tensor)
    return (
        current is not None
        and current.placements == tuple(placements)
        and np.array_equal(current.mesh.ranks, mesh.ranks)  # whatever the dimensions are called
    )


def lay_out(module: Module, name: str, mesh: DeviceMesh, placements: Sequence[Placement]) -> None:
    """As :func:`distribute_parameter`; one that lies so already, on all ranks, is taken as it is."""
    platform = mesh.platform
    tensor = {**own_buffers(platform, module), **own_parameters(platform, module)}[name]
    current = platform.sharding(tensor)
    if current is not None and is_laid_out(platform, tensor, mesh, placements):
        platform.shard_parameter(module, name, platform.local(tensor), current)
    else:
        distribute_parameter(module, name, mesh, placements)


def own_parameters(platform: Any, module: Module) -> dict[str, Any]:
    """The parameters that belong to *module* itself, not to a module below it."""
    return {name: parameter for name, parameter in platform.parameters(module).items() if "." not in name}


def own_buffers(platform: Any, module: Module) -> dict[str, Any]:
    """The buffers that belong to *module* itself."""
    return {name: buffer for name, buffer in platform.buffers(module).items() if "." not in name}


def distribute_module(
    module: Module,
    mesh: DeviceMesh,
    partition_fn: Callable[[str, Module, DeviceMesh], None] | None = None,
    input_fn: Callable[[Module, tuple[Any, ...], DeviceMesh], Any] | None = None,
    output_fn: Callable[[Module, Any, DeviceMesh], Any] | None = None,
) -> Module:
    """Distribute a module's parameters, and convert what goes in and comes out of it.

    Args:
        module: a native module of the mesh's platform.
        mesh: a hyperep mesh or a native one.
        partition_fn: called as ``partition_fn(path, submodule, mesh)`` for the module (path ``""``) and each one
            below it; it distributes what it wants to with :func:`distribute_parameter`.
        input_fn: called as ``input_fn(module, inputs, mesh)`` with the positional inputs; returns new ones.
        output_fn: called as ``output_fn(module, outputs, mesh)``; returns what the caller gets.

    Returns:
        The same module. Keyword arguments reach its forward unchanged.
    """
    mesh = adopt_mesh(mesh)
    platform = mesh.platform
    if partition_fn is not None:
        for path, submodule in platform.named_modules(module).items():
            partition_fn(path, submodule, mesh)

    def wrapper(module: Module, inner: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Any:
        if input_fn is not None:
            converted = input_fn(module, inputs, mesh)
            inputs = converted if isinstance(converted, tuple) else (converted,)
        outputs = inner(*inputs, **kwargs)
        return outputs if output_fn is None else output_fn(module, outputs, mesh)

    if input_fn is not None or output_fn is not None:
        # The module is an argument, so that a deep copy of it hands itself to the two functions.
        platform.wrap_forward(module, functools.partial(wrapper, module))
    return module
