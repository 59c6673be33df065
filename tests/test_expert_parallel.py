# SPDX-License-Identifier: Apache-2.0
"""EP against the unsharded layer on loopback: outputs and every gradient, on every rank."""

import numpy as np
import pytest

import hyperep
from hyperep.loopback import run
from hyperep.moe import MoE
from hyperep.sharding import gather_tensor

DIM, HIDDEN, EXPERTS, TOP_K, TOKENS = 6, 10, 8, 2, 12
STYLES = {
    "ep": (hyperep.ExpertParallel, lambda n: (n,), ("ep",)),
    "tp": (hyperep.TensorParallel, lambda n: (n,), ("tp",)),
    "etp-ep2": (hyperep.ExpertTensorParallel, lambda n: (2, n // 2), ("ep", "tp")),
}


def data(rank):
    rng = np.random.default_rng(100 + rank)
    return rng.normal(size=(TOKENS, DIM)).astype(np.float32), rng.normal(size=(TOKENS, DIM)).astype(np.float32)


def forward_backward(platform, layer, x, cotangent):
    names = list(platform.parameters(layer))
    handles = [platform.parameters(layer)[name] for name in names]
    out, pullback = platform.vjp(layer, platform.from_host(x), parameters=handles)
    grads = pullback(platform.from_host(cotangent))
    return platform.to_host(out)[0], platform.to_host(grads[0])[0], dict(zip(names, platform.to_host(*grads[1:]), strict=True))


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize(("style", "ranks"), [("ep", 1), ("ep", 2), ("ep", 4), ("tp", 2), ("etp-ep2", 2), ("etp-ep2", 4)])
def test_parity_with_the_unsharded_layer(style, ranks):
    make, shape, names = STYLES[style]

    def on_rank(platform):
        mesh = hyperep.init_device_mesh(platform, shape(ranks), names)
        replicated = platform.rank % mesh.size("tp") if "tp" in names else 0
        source = platform.rank - replicated if "tp" in names else platform.rank
        layer = MoE(platform, DIM, HIDDEN, EXPERTS, TOP_K, seed=3)
        make().apply(platform.named_modules(layer)["experts"], mesh)
        x, g = data(source)
        out, gx, grads = forward_backward(platform, layer, x, g)
        full = {}
        for name, parameter in platform.parameters(layer).items():
            sharding = platform.sharding(parameter)
            full[name] = grads[name] if sharding is None else gather_tensor(grads[name], sharding)
        return source, out, gx, full

    results = run(on_rank, ranks)
    sources = sorted({r[0] for r in results})

    def unsharded(platform):
        layer = MoE(platform, DIM, HIDDEN, EXPERTS, TOP_K, seed=3)
        x, g = (np.concatenate(parts) for parts in zip(*(data(s) for s in sources), strict=True))
        return forward_backward(platform, layer, x, g)

    out, gx, grads = run(unsharded, 1)[0]
    for source, got_out, got_gx, got in results:
        at = slice(sources.index(source) * TOKENS, (sources.index(source) + 1) * TOKENS)
        assert relative(got_out, out[at]) < 1e-5
        assert relative(got_gx, gx[at]) < 1e-5
        for name in ("experts.w1", "experts.w2", "experts.w3"):
            assert relative(got[name], grads[name]) < 1e-5, name
    gate = sum({r[0]: r[3]["router.gate"] for r in results}.values())
    assert relative(gate, grads["router.gate"]) < 1e-5
