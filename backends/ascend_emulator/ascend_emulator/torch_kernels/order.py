# SPDX-License-Identifier: Apache-2.0
"""Stream order for work that the host does in a device's place."""

import torch


def wait_for_stream(device: torch.device) -> None:
    """Wait until everything in the current stream of *device* has run, torch_npu's own task queue included.

    This is what makes a kernel that the CPU runs see what was put into its stream before, and nothing more: results of
    another stream (a collective that nobody waited for) are not waited for here either.
    """
    torch.npu.current_stream(device).synchronize()
