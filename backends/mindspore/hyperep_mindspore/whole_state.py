# SPDX-License-Identifier: Apache-2.0
"""The tensors of a cell whole and on the host, whatever the ranks that share them: what checkpoints are made of."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from mindspore import nn

from hyperep.platform.protocol import Platform
from hyperep.sharding import gather_tensor, local_part, whole_shape

__all__ = ["gather_state", "place_state"]


def gather_state(platform: Platform, cell: nn.Cell) -> dict[str, np.ndarray]:
    """Every parameter and buffer of *cell*, whole, by dotted path, on rank 0; nothing on the others.

    Collective over the ranks that share the parameters. One tensor at a time is whole on the device.
    """
    whole = {}
    for name, parameter in _tensors(platform, cell).items():
        sharding, local = platform.sharding(parameter), platform.stop_gradient(platform.local(parameter))
        tensor = local if sharding is None else gather_tensor(local, sharding)
        if platform.rank == 0:
            (whole[name],) = platform.to_host(tensor)
    return whole


def place_state(platform: Platform, cell: nn.Cell, whole: Mapping[str, np.ndarray]) -> None:
    """Put whole arrays into *cell*, in place, of which each rank takes its part. No communication.

    Args:
        platform: of the cell.
        cell: sharded or not, over as many ranks as there are now.
        whole: an array for each parameter and buffer of the cell, by dotted path; cast to its dtype.

    Raises:
        ValueError: names are missing or too many, or an array is not of its parameter's whole shape. Nothing was
            changed then.
    """
    tensors = _tensors(platform, cell)
    missing, unknown = sorted(tensors.keys() - whole.keys()), sorted(whole.keys() - tensors.keys())
    if missing or unknown:
        raise ValueError(f"the state has no {missing} and the cell has no {unknown}; both must have the same names")
    for name, parameter in tensors.items():
        if tuple(whole[name].shape) != tuple(whole_shape(platform, parameter)):
            raise ValueError(
                f"{name!r} is {tuple(whole[name].shape)} in the state and {tuple(whole_shape(platform, parameter))} in "
                "the cell; give whole tensors, not one rank's part of them"
            )
    for name, parameter in tensors.items():
        sharding, array = platform.sharding(parameter), whole[name]
        part = array if sharding is None else local_part(np, array, sharding)
        platform.assign(parameter, platform.xp.astype(platform.from_host(part), platform.local(parameter).dtype))


def _tensors(platform: Platform, cell: nn.Cell) -> dict[str, nn.Cell]:
    return {**platform.parameters(cell), **platform.buffers(cell)}
