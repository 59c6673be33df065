# SPDX-License-Identifier: Apache-2.0
"""``parallelize_module``: a plan of styles for a whole model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase

from hyperep.agreement import require_agreement
from hyperep.mesh import DeviceMesh
from hyperep.platform.protocol import Module
from hyperep.platform.selection import adopt_mesh
from hyperep.styles.expert_base import BaseExpertParallel
from hyperep.styles.identity import require_ties, require_whole_ties, ties, watched
from hyperep.styles.linear import ColwiseParallel, RowwiseParallel
from hyperep.styles.style import ParallelStyle
from hyperep.styles.tensor import TensorParallel

__all__ = ["parallelize_module"]

_NEAR_PATHS = 3

_SHARDING = (BaseExpertParallel, TensorParallel, ColwiseParallel, RowwiseParallel)
"""Styles that shard every parameter of what they are applied to."""


def parallelize_module(module: Module, mesh: DeviceMesh, plan: ParallelStyle | Mapping[str, ParallelStyle]) -> Module:
    """Apply styles to the parts of *module* that a plan names. Collective over the mesh.

    Args:
        module: a native module of the mesh's platform.
        mesh: a hyperep mesh or a native one. A style that names fewer dimensions than the mesh has gets the sub-mesh
            of those.
        plan: a style for the module itself; or styles by the dotted path of a part, in which each segment may be a
            pattern as of a shell: ``layers.*.moe.experts``, ``layers.[01].attention.w[qkv]``. A ``*`` stays within its
            segment, and ``""`` is the module itself.

    Returns:
        The same module.

    Raises:
        ValueError: on all ranks, a pattern matches nothing (the message names the nearest paths), two match the same
            part, the mesh lacks the dimensions of a style, a rank has another plan or other parts, one of two parts
            that share a parameter is sharded and the other is not, or a style refuses its part. Nothing has been
            changed then. Two parts that share a parameter lay it out in two ways.
        TypeError: an entry is no style. Nothing has been changed then.

    Example:
        >>> import hyperep
        >>> from hyperep.loopback import run
        >>> from hyperep.moe import MoEConfig, RouterConfig, build_moe
        >>> config = MoEConfig(
        ...     dim=8, hidden_dim=4, router=RouterConfig(num_experts=4, top_k=2), num_shared_experts=1
        ... )
        >>> plan = {
        ...     "experts": hyperep.ExpertTensorParallel(),
        ...     "shared_experts.w[13]": hyperep.ColwiseParallel(),
        ...     "shared_experts.w2": hyperep.RowwiseParallel(),
        ... }
        >>> def sharded(platform):
        ...     mesh = hyperep.init_device_mesh(platform, (2, 2), ("ep", "tp"))
        ...     layer = hyperep.parallelize_module(build_moe(platform, config), mesh, plan)
        ...     return {path: platform.local(p).shape for path, p in platform.parameters(layer).items()}
        >>> shapes = run(sharded, world_size=4)[0]
        >>> shapes["experts.w1"], shapes["shared_experts.w1.weight"], shapes["shared_experts.w2.weight"]
        ((2, 2, 8), (2, 8), (8, 2))
    """
    mesh = adopt_mesh(mesh)
    parts = mesh.platform.named_modules(module)
    entries: dict[str, object] = dict(plan) if isinstance(plan, Mapping) else {"": plan}
    told = [f"plan entry {pattern!r}, {type(style).__name__}" for pattern, style in entries.items()]
    require_agreement(mesh, "parallelize_module", [*told, *(f"part {path!r}" for path in parts)])
    styles = {pattern: _as_style(pattern, style, mesh) for pattern, style in entries.items()}
    matched: dict[str, str] = {}
    for pattern in styles:
        paths = [path for path in parts if _matches(path, pattern)]
        if not paths:
            raise ValueError(f"plan entry {pattern!r} matches no part of the module; {_near(pattern, parts)}")
        for path in paths:
            if path in matched:
                raise ValueError(
                    f"plan entries {matched[path]!r} and {pattern!r} both match {path!r}; a part gets one style, so "
                    "make one of them narrower"
                )
            matched[path] = pattern
    meshes = {pattern: _mesh_for(pattern, style, mesh) for pattern, style in styles.items()}
    shared = ties(mesh.platform, parts)
    require_whole_ties(shared, [path for path, pattern in matched.items() if isinstance(styles[pattern], _SHARDING)])
    for path, pattern in matched.items():
        styles[pattern].check(parts[path], meshes[pattern])
    with watched(mesh.platform, module):
        for path, pattern in matched.items():
            styles[pattern].apply(parts[path], meshes[pattern])
        require_ties(mesh.platform, parts, shared)
    return module


def _matches(path: str, pattern: str) -> bool:
    if not path:
        return not pattern  # the module itself has no segment that a pattern could match
    segments, patterns = path.split("."), pattern.split(".")
    return len(segments) == len(patterns) and all(map(fnmatchcase, segments, patterns))


def _near(pattern: str, parts: Mapping[str, Module]) -> str:
    """The paths that were perhaps meant, for people to read."""
    paths = [path for path in parts if path]
    near = difflib.get_close_matches(pattern, paths, n=_NEAR_PATHS, cutoff=0.5)
    if near:
        return f"did you mean {', '.join(map(repr, near))}?"
    shown = ", ".join(map(repr, paths[:_NEAR_PATHS])) or "none, so use the pattern ''"
    return f"its parts are {shown}" + (f" and {len(paths) - _NEAR_PATHS} more" if len(paths) > _NEAR_PATHS else "")


def _as_style(pattern: str, style: object, mesh: DeviceMesh) -> ParallelStyle:
    """The entry of a plan as the core's style; a platform may know styles of its framework's own.

    Raises:
        TypeError: it is none.
    """
    if isinstance(style, ParallelStyle):
        return style
    adopt = getattr(mesh.platform, "adopt_style", None)
    adopted: ParallelStyle | None = None if adopt is None else adopt(style)
    if adopted is None:
        raise TypeError(
            f"plan entry {pattern!r} is a {type(style).__module__}.{type(style).__qualname__}, which is no parallel "
            "style; give it an object of one, such as ExpertParallel()"
        )
    return adopted


def _mesh_for(pattern: str, style: ParallelStyle, mesh: DeviceMesh) -> DeviceMesh:
    """The dimensions of *mesh* that a style names.

    Raises:
        ValueError: there are none of these names, and not as many in all.
    """
    names = getattr(style, "mesh_dim_names", None)
    if names is None or mesh.mesh_dim_names in (None, names):
        return mesh
    if set(names) < set(mesh.mesh_dim_names or ()):
        return mesh[tuple(names)]
    if mesh.ndim != len(names):
        raise ValueError(
            f"plan entry {pattern!r}: {type(style).__name__} needs the dimensions {names}, but the mesh is {mesh}; "
            "name dimensions so, or parallelize this part on a mesh of its own"
        )
    return mesh
