# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of MindSpore's: at another number of ranks, and between frameworks."""

import mindspore as ms
import numpy as np
import pytest
import weights_between
from hyperep_mindspore.whole_state import gather_state, place_state
from measure import fill_weights, rows
from mindspore import nn

import hyperep
from hyperep.moe import MoEConfig, RouterConfig, build_moe

FORMATS = ("ckpt", "safetensors")
SHAPES = {
    **{"up.weight": (6, 5), "up.bias": (6,), "moe.router.gate": (8, 6), "moe.router.expert_bias": (8,)},
    **{"moe.experts.w1": (8, 8, 6), "moe.experts.w2": (8, 6, 8), "moe.experts.w3": (8, 8, 6)},
}
WHOLE = {name: rows(seed, *shape) for seed, (name, shape) in enumerate(SHAPES.items())}
"""Other values under every name."""
ROUTER = RouterConfig(num_experts=8, top_k=2, score_function="sigmoid", expert_bias=True)


class Model(nn.Cell):
    """A dense layer of MindSpore's, and experts over all ranks."""

    def __init__(self, platform, tp=1):
        super().__init__()
        self.up = nn.Dense(5, 6)
        self.moe = build_moe(platform, MoEConfig(dim=6, hidden_dim=8, router=ROUTER))
        mesh = hyperep.init_device_mesh(platform, (platform.world_size // tp, tp), ("ep", "tp"))
        style = hyperep.ExpertTensorParallel() if tp > 1 else hyperep.ExpertParallel()
        style.apply(self.moe.experts, mesh if tp > 1 else mesh["ep"])

    def construct(self, x):
        return self.moe(self.up(x))


def write(platform, path, format, tp):
    """As docs/mindspore.md has it."""
    model = Model(platform, tp)
    place_state(platform, model, WHOLE)
    whole = gather_state(platform, model)
    if platform.rank == 0:
        ms.save_checkpoint([{"name": n, "data": ms.Tensor(a)} for n, a in whole.items()], path, format=format)
    platform.barrier()
    return model(platform.from_host(rows(5, 9, 5))).asnumpy()


def read(platform, path, format, tp):
    """As docs/mindspore.md has it; returns what the model makes of the same tokens."""
    model = Model(platform, tp)
    loaded = ms.load_checkpoint(path, format=format)
    place_state(platform, model, {name: tensor.asnumpy() for name, tensor in loaded.items()})
    whole = gather_state(platform, model)
    if platform.rank == 0:
        assert whole.keys() == WHOLE.keys()
        for name, array in whole.items():
            np.testing.assert_array_equal(array, WHOLE[name], err_msg=name)
    return model(platform.from_host(rows(5, 9, 5))).asnumpy()


@pytest.mark.parametrize("format", FORMATS)
def test_saved_at_one_world_size_and_loaded_at_others(platform, two, four, tmp_path, format):
    path = str(tmp_path / f"model.{format}")
    (written, *_) = two.run("test_checkpoints:write", {"path": path, "format": format, "tp": 1}, deadline=240.0)
    for found in (
        read(platform, path, format, 1),
        *four.run("test_checkpoints:read", {"path": path, "format": format, "tp": 1}, deadline=240.0),
        *four.run("test_checkpoints:read", {"path": path, "format": format, "tp": 2}, deadline=240.0),
    ):
        np.testing.assert_allclose(found, written, rtol=1e-4, atol=1e-4)
    assert np.abs(written).max() > 0.1


def test_a_state_that_does_not_fit_changes_nothing(platform):
    model = Model(platform)
    place_state(platform, model, WHOLE)
    before = {name: p.asnumpy().copy() for name, p in model.parameters_and_names()}
    other = {name: array + 1 for name, array in WHOLE.items()}
    with pytest.raises(ValueError, match=r"has no \['up.bias'\] and the cell has no \['down'\]"):
        place_state(platform, model, {**{n: a for n, a in other.items() if n != "up.bias"}, "down": np.ones(2)})
    with pytest.raises(ValueError, match=r"'moe.experts.w2' is \(4, 6, 8\) in the state and \(8, 6, 8\) in the cell"):
        place_state(platform, model, {**other, "moe.experts.w2": np.ones((4, 6, 8))})
    for name, parameter in model.parameters_and_names():
        np.testing.assert_array_equal(parameter.asnumpy(), before[name], err_msg=name)


def test_the_kept_file_is_what_mindspore_writes(platform, tmp_path):
    path = tmp_path / "layer.safetensors"
    ms.save_checkpoint(weights_between.made(platform, "mindspore"), str(path), format="safetensors")
    weights_between.writes_what_is_kept("mindspore", path)


@pytest.mark.parametrize("writer", weights_between.WRITERS)
def test_weights_that_another_framework_has_written(platform, writer):
    layer = build_moe(platform, weights_between.CONFIG)
    fill_weights(platform, layer, seed=99)
    loaded = ms.load_checkpoint(str(weights_between.FILES / f"{writer}.safetensors"), format="safetensors")
    not_loaded, _ = ms.load_param_into_net(layer, loaded, strict_load=True)
    assert not not_loaded
    weights_between.computes_with(platform, layer, writer)
