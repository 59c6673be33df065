# SPDX-License-Identifier: Apache-2.0
"""The size of HCCL's buffers, for the groups that the platform makes."""

from __future__ import annotations

import pytest
from hyperep_torch_npu.platform import join


@pytest.mark.emulator  # hardware tells nothing
def test_buffers_of_a_group_are_as_large_as_was_asked_for(pools):
    """An option that HCCL never hears of, or that it hears for the groups of others."""
    small, usual = (f"emulated NPU: a communicator of 2 ranks with buffers of {size} MB" for size in (50, 200))
    assert pools(2).run("npu_programs:told_buffers", {}, deadline=60) == [[[small], [usual]]] * 2


def test_a_buffer_of_nothing_is_refused():
    with pytest.raises(ValueError, match="hccl_buffer_mb=0: give a whole number of MB"):
        join(hccl_buffer_mb=0)
