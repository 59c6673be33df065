# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own tools on parameters that are sharded over Ascend devices."""

from __future__ import annotations


def test_optimizer_clipping_and_distributed_checkpoint(pools, tmp_path):
    pools(2).run("torch_tools:optimizer_clipping_and_checkpoint", {"folder": str(tmp_path)}, deadline=120)


def test_fsdp2_on_a_two_dimensional_mesh(pools):
    pools(4).run("torch_tools:fsdp2", {}, deadline=120)
