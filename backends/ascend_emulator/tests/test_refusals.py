# SPDX-License-Identifier: Apache-2.0
"""What the emulated device does not do it says, with the name of what was asked for."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, mint, ops

ONES = np.ones((2, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.sigmoid(Tensor(ONES)), r"aclnnSigmoid.md does not list DOUBLE for self"),
        (lambda: ops.matmul(Tensor(ONES), Tensor(ONES)), r"aclnnMatmul.md does not list DOUBLE for self"),
        (lambda: mint.sort(Tensor(ONES), stable=True)[0], r"aclnnSort.md does not list DOUBLE for self"),
        (
            lambda: mint.searchsorted(Tensor(ONES[0], ms.bfloat16), Tensor(ONES[0], ms.bfloat16)),
            "does not list BFLOAT16",
        ),
    ],
)
def test_what_a_page_of_cann_does_not_list_is_refused_with_its_name(call, message) -> None:
    """An adapter that relies on more than is documented, and fails on hardware only."""
    with pytest.raises(RuntimeError, match=message):
        call().asnumpy()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: mint.erfinv(Tensor(ONES, ms.float32)), "aclnnErfinv"),
        (lambda: ops.randn(2, 2), "StandardNormal"),
    ],
)
def test_an_operator_that_is_not_emulated_is_named(call, name) -> None:
    """Zeros, or what was in memory, in place of a result."""
    with pytest.raises(RuntimeError, match=name):
        call().asnumpy()
