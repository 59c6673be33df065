# SPDX-License-Identifier: Apache-2.0
"""``Linear``: a neutral two-dimensional weight, with or without bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hyperep.moe.config import require_whole
from hyperep.moe.init import Seed, generator, uniform_fan_in
from hyperep.platform.protocol import Module, Platform

__all__ = ["Linear"]


def Linear(  # noqa: N802 (it makes modules, as a class would)
    platform: Platform[Any], in_features: int, out_features: int, *, bias: bool = False, seed: Seed | None = None
) -> Module:
    """Make a native module that computes ``x weight^T + bias``.

    Args:
        platform: whose module to make.
        in_features: size of the last dim of the input.
        out_features: size of the last dim of the output.
        bias: whether there is one; it starts at zero.
        seed: of the initial weight; see :mod:`hyperep.moe.init`. Left out, each module gets another.

    Returns:
        A module with a parameter ``weight`` ``[out, in]`` and perhaps ``bias`` ``[out]``, float32; called with
        ``[..., in]`` it returns ``[..., out]``. The keyword ``reduce``, a function of one tensor, is applied to the
        product before the bias is added: a row-parallel style sums there, so that the bias is added once.

    Raises:
        ValueError: a size is below one.
    """
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        require_whole(f"Linear: {name}", size)
        if size < 1:
            raise ValueError(f"Linear({name}={size}): must be at least 1")
    parameters = {"weight": platform.from_host(uniform_fan_in(generator(platform, seed), (out_features, in_features)))}
    if bias:
        parameters["bias"] = platform.from_host(np.zeros(out_features, np.float32))

    def forward(m: Any, x: Any, *, reduce: Callable[[Any], Any] | None = None) -> Any:
        product = x @ platform.xp.permute_dims(m.weight, (1, 0))  # [..., out]
        product = product if reduce is None else reduce(product)
        return product + m.bias if bias else product

    description = f"in_features={in_features}, out_features={out_features}, bias={bias}"
    return platform.make_module("Linear", parameters, forward, description=description)
