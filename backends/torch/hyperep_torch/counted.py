# SPDX-License-Identifier: Apache-2.0
"""Random numbers by their place: each is a function of a key and of its index, and of nothing that was drawn before.

So a rank draws its part of a tensor and nothing else, and the whole is the same however it is cut. The function is that
of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch

__all__ = ["Start", "fill", "key_of", "normal", "start_of", "uniform"]

_CHUNK = 1 << 16
"""Elements that are computed at a time: what a fill needs beside the tensor is a few megabytes."""


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)

Numbers = Callable[[int, torch.Tensor], torch.Tensor]
"""``numbers(key, index)``: float64 numbers for the int64 tensor *index* of places."""

Start = int | torch.Tensor
"""Where a part begins along a dim; or, if it is of several parts, all its indices, int64 on the host."""


def key_of(*parts: object) -> int:
    """A key from whatever tells one draw from another."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def uniform(key: int, index: torch.Tensor) -> torch.Tensor:
    """Uniform in ``[0, 1)``, with 53 random bits."""
    return _bits(key, index).to(torch.float64) * 2.0**-53


def normal(key: int, index: torch.Tensor) -> torch.Tensor:
    """Standard normal, by the method of Box and Muller."""
    radius = 1.0 - uniform(key, 2 * index)  # in (0, 1]
    angle = uniform(key, 2 * index + 1)
    return (-2.0 * radius.log()).sqrt_() * (2.0 * math.pi * angle).cos_()


def start_of(indices: torch.Tensor) -> Start:
    """That of these indices along a dim."""
    indices = indices.cpu()
    first = int(indices[0]) if len(indices) else 0
    return first if torch.equal(indices, torch.arange(first, first + len(indices), device="cpu")) else indices


def fill(
    local: torch.Tensor, whole: Sequence[int], offset: Sequence[Start], numbers: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Fill the part *local*, which begins at *offset* of a tensor of shape *whole*, in place.

    *numbers* gets the places of some elements in the flattened whole, int64, and returns their values.
    """
    target = local if local.is_contiguous() else torch.empty_like(local, memory_format=torch.contiguous_format)
    flat = target.view(-1)
    # Not every accelerator has wide integers and float64; there the host computes.
    device = local.device if local.device.type in ("cpu", "cuda") else torch.device("cpu")
    offset = [start if isinstance(start, int) else start.to(device) for start in offset]
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        index = torch.arange(start, start + part.numel(), dtype=torch.int64, device=device)
        part.copy_(numbers(_places(index, local.shape, whole, offset)))
    if target is not local:
        local.copy_(target)


def _places(index: torch.Tensor, local: Sequence[int], whole: Sequence[int], offset: Sequence[Start]) -> torch.Tensor:
    """Places in the flattened whole of the elements *index* of the flattened part."""
    if tuple(local) == tuple(whole):
        return index
    if tuple(local[1:]) == tuple(whole[1:]) and isinstance(offset[0], int):
        return index + offset[0] * math.prod(whole[1:])
    places, rest, stride = torch.zeros_like(index), index, 1
    for here, size, start in zip(reversed(local), reversed(whole), reversed(offset), strict=True):
        along = rest % here
        places += (along + start if isinstance(start, int) else start[along]) * stride
        rest, stride = rest // here, stride * size
    return places


def _bits(key: int, index: torch.Tensor) -> torch.Tensor:
    """53 random bits for each place, as non-negative int64."""
    z = (index + 1) * _GOLDEN + key
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return _shifted(z ^ _shifted(z, 31), 11)


def _shifted(z: torch.Tensor, by: int) -> torch.Tensor:
    """*z* shifted to the right with zeros; PyTorch's own shift of int64 brings the sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)
