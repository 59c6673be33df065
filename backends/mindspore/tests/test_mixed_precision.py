# SPDX-License-Identifier: Apache-2.0
"""MindSpore's mixed precision over a model with a layer of hyperep's: as in float32 but for the digits."""

import copy

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from mindspore.amp import auto_mixed_precision

from hyperep.moe import MoE


class Model(nn.Cell):
    """The layer between two of MindSpore's own."""

    def __init__(self, platform):
        super().__init__()
        self.up, self.down = nn.Dense(6, 8), nn.Dense(8, 6)
        self.moe = MoE(platform, dim=8, hidden_dim=16, num_experts=4, top_k=2)

    def construct(self, x):
        return self.down(self.moe(self.up(x)))


def _step(model, x):
    weights = model.trainable_params()
    value, gradients = ms.value_and_grad(lambda x: ops.sum(ops.cast(model(x), ms.float32) ** 2), None, weights)(x)
    return [value, *gradients]


def _layer_alone(model):
    model.moe.to_float(ms.float16)
    model.down.to_float(ms.float16)  # which takes what the layer returns
    return model


WAYS = {
    "O1": lambda model: auto_mixed_precision(model, "O1", ms.float16),
    "O2": lambda model: auto_mixed_precision(model, "O2", ms.float16),
    "to_float": lambda model: model.to_float(ms.float16),
    "to_float of the layer": _layer_alone,
}


@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_are_those_of_float32(platform, way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # O1 writes what it has made of the network's source
    rng = np.random.default_rng(0)
    model = Model(platform)
    for parameter in model.trainable_params():
        shape = parameter.shape
        platform.assign(parameter, Tensor((rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)))
    x = Tensor(rng.normal(size=(12, 6)).astype(np.float32))
    plain = _step(model, x)
    narrow = WAYS[way](copy.deepcopy(model))
    inside = []
    (experts,) = (cell for name, cell in narrow.cells_and_names() if name.endswith("moe.experts"))
    experts.register_forward_hook(lambda cell, inputs, output: inside.append(output.dtype))
    found = _step(narrow, x)
    assert set(inside) == {ms.float32 if way == "O1" else ms.float16}
    for got, want, name in zip(found, plain, ["loss", *(p.name for p in model.trainable_params())], strict=True):
        assert got.dtype == ms.float32, name  # an optimizer's weights are float32, and their gradients with them
        a, b = got.asnumpy(), want.asnumpy()
        assert np.abs(a - b).max() < 2e-2 * np.abs(b).max(), name
        assert np.abs(a - b).max() > 0, name
    assert all(p.dtype == ms.float32 for p in narrow.trainable_params())
