# SPDX-License-Identifier: Apache-2.0
"""Which precision a run gets, and that all of it is in that precision."""

import numpy as np
import pytest

from hyperep.loopback import LoopbackPlatform
from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.errors import UnsupportedCapability
from hyperep.train.precision import choose_dtype
from hyperep.train.trainer import new_state, train_step


class Declaring(LoopbackPlatform):
    def __init__(self, float64):
        super().__init__()
        self.capabilities = {Capability.FLOAT64: float64}


@pytest.mark.parametrize(
    ("support", "dtype"),
    [(Support.FULL, "float64"), (Support.EMULATED, "float32"), (Support.UNSUPPORTED, "float32")],
)
def test_double_where_the_platform_has_it_natively(support, dtype):
    assert choose_dtype(Declaring(support), "auto") == dtype
    assert choose_dtype(Declaring(support), "float32") == "float32"


def test_double_from_a_platform_without_it():
    assert choose_dtype(Declaring(Support.EMULATED), "float64") == "float64"
    with pytest.raises(UnsupportedCapability, match="does not support float64: train with --dtype float32 or auto"):
        choose_dtype(Declaring(Support.UNSUPPORTED), "float64")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_everything_has_the_precision_of_the_run(small, dtype):
    platform = LoopbackPlatform()
    settings = small(dtype=dtype)
    state = new_state(platform, settings, unsharded=True)
    state, _ = train_step(platform, settings, state, np.ones((settings.sequences, settings.seq_len + 1), np.int64))
    assert {parameter.dtype for parameter in state.parameters.values()} == {np.dtype(dtype)}
    assert {m.dtype for part in (state.moments.mean, state.moments.square) for m in part.values()} == {np.dtype(dtype)}
    logits, _ = state.model(np.ones((1, settings.seq_len), np.int64))
    assert logits.dtype == np.dtype(dtype)
