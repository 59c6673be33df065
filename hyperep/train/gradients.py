# SPDX-License-Identifier: Apache-2.0
"""What gradients need between backward and optimizer: the sum over ranks, and a bound on their norm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hyperep.platform.protocol import Group, Parameter, Platform
from hyperep.train.parallel import Parallel, sharded_dimensions

__all__ = ["clip_scale", "global_norm", "reduce_together", "sum_gradients"]


def sum_gradients(
    platform: Platform[Any],
    parameters: Mapping[str, Parameter],
    gradients: Mapping[str, Any],
    parallel: Parallel,
    others: Sequence[Any] = (),
) -> tuple[dict[str, Any], list[Any]]:
    """Sum over the data dimension the gradients of parameters that it does not shard, and *others* with them.

    The gradient of an expert that the dimension does shard has met the tokens of all its ranks already, through the
    all-to-all, and is left as it is. Along ``tp`` nothing is summed: its ranks have the same tokens, and the styles
    have reduced there what was partial. One collective for everything.
    """
    if parallel.mesh is None or parallel.data_ranks == 1:
        return dict(gradients), list(others)
    data = parallel.dimensions[0]
    summed = [name for name in gradients if data not in sharded_dimensions(platform.sharding(parameters[name]))]
    totals = reduce_together(platform, [*(gradients[name] for name in summed), *others], parallel.mesh.get_group(data))
    return {**gradients, **dict(zip(summed, totals, strict=False))}, totals[len(summed) :]


def reduce_together(platform: Platform[Any], tensors: Sequence[Any], group: Group) -> list[Any]:
    """All-reduce tensors of one dtype and any shapes in one collective."""
    xp = platform.xp
    shapes = [tuple(tensor.shape) for tensor in tensors]
    flat = platform.all_reduce(xp.concat([xp.reshape(tensor, (-1,)) for tensor in tensors], axis=0), group)
    totals, start = [], 0
    for shape in shapes:
        size = math.prod(shape)
        totals.append(xp.reshape(flat[start : start + size], shape))
        start += size
    return totals


def global_norm(
    platform: Platform[Any], parameters: Mapping[str, Parameter], gradients: Mapping[str, Any], parallel: Parallel
) -> Any:
    """The norm of the gradient of the whole model: a scalar, the same on every rank.

    Squares of a sharded parameter are summed over the dimensions that shard it, those of a replicated one are not, so
    that each element counts once.
    """
    xp = platform.xp
    squares: dict[frozenset[str], Any] = {}
    for name, gradient in gradients.items():
        dimensions = sharded_dimensions(platform.sharding(parameters[name]))
        square = xp.sum(gradient * gradient)
        squares[dimensions] = squares[dimensions] + square if dimensions in squares else square
    for dimension in parallel.dimensions:
        for dimensions in [key for key in squares if dimension in key]:
            assert parallel.mesh is not None
            squares[dimensions] = platform.all_reduce(squares[dimensions], parallel.mesh.get_group(dimension))
    total = 0.0
    for dimensions in sorted(squares, key=sorted):
        total = total + squares[dimensions]
    return xp.sqrt(total)


def clip_scale(platform: Platform[Any], norm: Any, bound: float) -> Any:
    """What to multiply all gradients by so that their norm does not exceed *bound*; never above one."""
    xp = platform.xp
    return bound / xp.maximum(norm, xp.full((), bound, dtype=norm.dtype))
