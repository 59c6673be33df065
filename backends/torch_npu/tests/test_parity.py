# SPDX-License-Identifier: Apache-2.0
"""Styles against the unsharded layer, between real ranks of HCCL: the core's neutral cases."""

from __future__ import annotations

import bad_input_cases
import chunk_cases
import parity
import pytest

GRID = [("ep", 2, 1), ("ep", 4, 1), ("tp", 1, 2), ("tp", 1, 4), ("etp", 2, 2)]


@pytest.mark.parametrize(("style", "ep", "tp"), GRID)
def test_sharded_layer_agrees_with_the_unsharded(pools, style, ep, tp):
    pools(ep * tp).run("parity:sharded_layer_agrees", {"style": style, "ep": ep, "tp": tp}, deadline=120)


@pytest.mark.parametrize("config", ["deepseek-v3", "mixtral-8x7b"])
def test_layers_of_published_models_agree(pools, config):
    case = {"style": "plan" if config == "deepseek-v3" else "etp", "ep": 2, "tp": 2, "config": config}
    pools(4).run("parity:configured_layer_agrees", case, deadline=120)


@pytest.mark.parametrize(("style", "ep", "tp", "chunks"), parity.IN_CHUNKS)
def test_layers_in_chunks_agree(pools, style, ep, tp, chunks):
    case = {"style": style, "ep": ep, "tp": tp, "config": "deepseek-v3", "chunks": chunks}
    pools(ep * tp).run("parity:configured_layer_agrees", case, deadline=120)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", chunk_cases.CASES)
def test_layers_in_chunks(pools, case, ranks):
    pools(ranks).run(f"chunk_cases:{case.__name__}", {}, deadline=120)


def test_one_style_serves_two_layers(pools):
    pools(2).run("parity:one_style_serves_two_layers", {}, deadline=60)


@pytest.mark.parametrize(("ranks", "style", "tp"), [(2, "ep", 1), (4, "etp", 2)])
def test_training_keeps_replicas_equal(pools, ranks, style, tp):
    pools(ranks).run("replicas:training_keeps_replicas_equal", {"style": style, "tp": tp}, deadline=120)


def rows_of_the_host(platform):
    """Rows that were left on the host on one rank: an error of every rank, which says where they are."""
    import numpy as np
    import torch

    import hyperep

    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",))
    x, counts = platform.from_host(np.ones((4, 3), np.float32)), platform.from_host(np.ones(4, np.int64))
    rows = torch.ones(4, 3) if platform.rank == 1 else x
    with pytest.raises(TypeError, match=r"rank 1: .* dense and on its device .*npu:") as raised:
        hyperep.dispatch(rows, counts, mesh)
    assert ("rows is a torch.Tensor on cpu" in str(raised.value)) == (platform.rank == 1)
    received, _, context = hyperep.dispatch(x, counts, mesh)
    assert platform.to_host(hyperep.combine(received, context))[0].sum() == 12


def test_rows_of_the_host_raise_on_all(pools):
    pools(2).run("test_parity:rows_of_the_host", {}, deadline=60)


@pytest.mark.parametrize("ranks", [2, 4])
def test_bad_input_on_one_rank_raises_on_all(pools, ranks):
    pools(ranks).run("dispatch_cases:all_bad_input", {}, deadline=120)


def test_unlike_on_one_rank_raises_on_all(pools):
    for name in bad_input_cases.UNLIKE:
        pools(2).run("bad_input_cases:unlike_on_one_rank_raises_on_all", {"name": name}, deadline=60)


@pytest.mark.parametrize(("style", "ranks"), [("ep", 2), ("etp", 4)])
def test_buffers_of_experts_are_split(pools, style, ranks):
    pools(ranks).run("style_cases:buffers_of_experts_are_split", {"style": style}, deadline=60)


@pytest.mark.parametrize("layout", ["packed", "interleaved"])
def test_fused_weights_agree_with_the_whole(pools, layout):
    case = {"style": "etp", "layout": layout}
    pools(4).run("style_cases:fused_weights_agree_with_the_whole", case, deadline=60)
