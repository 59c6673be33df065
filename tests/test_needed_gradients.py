# SPDX-License-Identifier: Apache-2.0
"""Hand-written backwards of the core keep to the protocol: no gradient is absent where one is needed."""

import numpy as np
import pytest

from hyperep.loopback import LoopbackPlatform
from hyperep.platform.base import PlatformBase

X = np.arange(12, dtype=np.float32).reshape(6, 2)
ORDER = np.array([3, 1, 5, 0, 2, 4])
BACK = np.argsort(ORDER)
PAIRS = np.arange(6).reshape(3, 2)


class Strict(LoopbackPlatform):
    """Takes no backward at its word; some tapes crash where a gradient is absent."""

    def __init__(self):
        super().__init__()
        self.checked = 0

    def custom_vjp(self, forward, backward):
        def strict(residuals, cotangents, needed):
            gradients = backward(residuals, cotangents, needed)
            assert len(gradients) == len(needed)
            assert all((g is not None) or not n for g, n in zip(gradients, needed, strict=True)), needed
            self.checked += 1
            return gradients

        return super().custom_vjp(forward, strict)


DEFAULTS = {
    "stop_gradient": lambda p, x: PlatformBase.stop_gradient(p, x),
    "copy_to_group": lambda p, x: PlatformBase.copy_to_group(p, x),
    "reduce_from_group": lambda p, x: PlatformBase.reduce_from_group(p, x),
    "permute_rows": lambda p, x: PlatformBase.permute_rows(p, x, ORDER, BACK),
    "sum_rows": lambda p, x: PlatformBase.sum_rows(p, x, PAIRS, np.arange(6)),
    "sum_rows with weights": lambda p, x: PlatformBase.sum_rows(p, x, PAIRS, np.arange(6), np.ones((3, 2), np.float32)),
    "swiglu": lambda p, x: PlatformBase.swiglu(p, x, X),
    "swiglu of both": lambda p, x: PlatformBase.swiglu(p, x, x),
    "grouped_matmul": lambda p, x: PlatformBase.grouped_matmul(p, x, np.ones((2, 3, 2), np.float32), np.array([2, 4])),
    "exchange": lambda p, x: PlatformBase.differentiable_all_to_all_single(p, x, [6], [6]),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_default_gives_every_gradient_that_is_needed(name):
    platform = Strict()
    # Of an intermediate result, whose history goes on.
    out, pullback = platform.vjp(lambda x: DEFAULTS[name](platform, x * 2.0), X)
    (gradient,) = pullback(np.ones_like(out))
    assert gradient.shape == X.shape
    assert platform.checked == 1
