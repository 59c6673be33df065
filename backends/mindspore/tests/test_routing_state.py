# SPDX-License-Identifier: Apache-2.0
"""The expert bias stays float32, and routers compute in it, whatever their layer is cast to."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import hyperep
from hyperep.moe import MoEConfig, RouterConfig, build_moe, update_expert_bias

BIAS = np.array([0.1, 1.001, -1.003, 0.0], np.float32)


class Model(nn.Cell):
    """A user's own cell around the layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def construct(self, x, **kwargs):
        return self.layer(x, **kwargs)


CASTS = {
    "to": lambda layer: layer.to(ms.float16),
    "inside a model": lambda layer: Model(layer).to(dtype=ms.float16).layer,
    "to_float": lambda layer: layer.to_float(ms.float16),
    "to_float inside a model": lambda layer: Model(layer).to_float(ms.float16).layer,
}


def _layer(platform, bias=None, **router):
    config = RouterConfig(**{"num_experts": 4, "top_k": 2, "expert_bias": True, **router})
    layer = build_moe(platform, MoEConfig(dim=8, hidden_dim=4, router=config), seed=3)
    if bias is not None:
        platform.assign(layer.router.expert_bias, platform.from_host(bias))
    return layer


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_small_steps_are_kept(platform, cast):
    """Steps of 0.001 from 2.0 on, where float16 numbers are 0.002 apart."""
    layer = cast(_layer(platform, np.full(4, 2.0, np.float32)))
    for _ in range(30):
        update_expert_bias(platform, layer, platform.from_host(np.array([0, 4, 2, 2])), 0.0009)
    np.testing.assert_allclose(layer.router.expert_bias.asnumpy(), [2.027, 1.973, 2.0, 2.0], atol=1e-5)


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_no_digit_is_lost(platform, cast, tmp_path):
    """Neither by the cast nor by a checkpoint."""
    layer = cast(_layer(platform, BIAS))
    assert (layer.router.expert_bias.asnumpy() == BIAS).all()
    ms.save_checkpoint(layer, str(tmp_path / "layer.ckpt"))
    other = cast(_layer(platform))
    ms.load_param_into_net(other, ms.load_checkpoint(str(tmp_path / "layer.ckpt")))
    assert other.router.expert_bias.dtype == ms.float32
    assert (other.router.expert_bias.asnumpy() == BIAS).all()


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_the_choice_uses_every_digit(platform, cast):
    """Biases that float16 cannot tell apart, and float32 can, decide between equal scores."""
    layer = cast(_layer(platform, np.array([4.0, 4.0005, 4.001, 4.0015], np.float32)))
    platform.assign(layer.router.gate, platform.xp.zeros_like(layer.router.gate))
    stats = layer(platform.xp.ones((1, 8), dtype=layer.experts.w1.dtype), with_stats=True)[1]
    assert stats.routing.experts.asnumpy().tolist() == [[3, 2]]


@pytest.mark.parametrize("expert_bias", [False, True])
def test_to_float_narrows_the_experts_and_not_the_router(platform, expert_bias):
    """As a layer that is in float16: routing in float32, experts in float16, gradients of the float32 weights."""
    x = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float16)
    results = []
    for cast in (lambda layer: layer, lambda layer: Model(layer).to_float(ms.float16)):
        layer = _layer(platform, expert_bias=expert_bias)
        model = cast(layer)
        parameters = platform.parameters(layer)
        wide = Tensor(x.astype(np.float32))
        seen = []
        inner = layer.experts
        platform.wrap_forward(
            inner, lambda call, x, *routing, seen=seen, **hints: seen.append(x.dtype) or call(x, *routing, **hints)
        )
        out, pullback = platform.vjp(lambda x, model=model: model(x), wide, parameters=list(parameters.values()))
        stats = model(wide, with_stats=True)[1]
        for field in ("logits", "probabilities", "scores"):
            assert getattr(stats.routing, field).dtype == ms.float32, field
        gradients = pullback(platform.xp.astype(Tensor(np.ones((6, 8), np.float32)), out.dtype))
        assert all(gradient.dtype == ms.float32 for gradient in gradients)
        results.append((seen[0], out.dtype, [g.asnumpy() for g in (out, *gradients)], stats.routing.experts.asnumpy()))
    (wide_rows, wide_out, wanted, experts), (rows, out, found, chosen) = results
    assert (wide_rows, wide_out, rows, out) == (ms.float32, ms.float32, ms.float16, ms.float16)
    assert (chosen == experts).all()
    for value, right in zip(found, wanted, strict=True):
        assert np.abs(value - right).max() < 0.01 * np.abs(right).max()


def test_a_sharded_layer_under_to_float(platform):
    """Within the last digit: a rank's sum over its experts is rounded once more than the whole layer's."""
    """Within the last digit: a rank's sum over its experts is rounded once more than the whole layer's."""
    layer = Model(_layer(platform, BIAS)).to_float(ms.float16).layer
    x = Tensor(np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32))
    expected = layer(x).asnumpy()
    mesh = hyperep.init_device_mesh(platform, (1,), ("ep",))
    hyperep.ExpertParallel().apply(layer.experts, mesh)
    out = layer(x).asnumpy()
    assert out.dtype == np.float16
    assert np.abs(out.astype(float) - expected).max() <= np.spacing(np.abs(expected).max())
