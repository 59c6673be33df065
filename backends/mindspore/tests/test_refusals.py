# SPDX-License-Identifier: Apache-2.0
"""Compilers and transformations that hyperep cannot run under say so, and the cells around the layer can be compiled.

In a process of its own: MindSpore's compilers leave files and settings behind, and one of them used to end the process.
"""

import json
import os
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from mindspore.parallel.auto_parallel import AutoParallel

import hyperep
from hyperep.moe import MoE

REFUSED = "hyperep runs in PyNative mode"


class Model(nn.Cell):
    """The layer between two of MindSpore's own."""

    def __init__(self, platform):
        super().__init__()
        self.up, self.down = nn.Dense(6, 8), nn.Dense(8, 6)
        self.moe = MoE(platform, dim=8, hidden_dim=6, num_experts=4, top_k=2)

    def construct(self, x):
        return self.down(self.moe(self.up(x)))


def _styled(platform):
    """A cell of MindSpore's own that a wrapper was put around, as styles do."""
    dense = nn.Dense(6, 6)
    platform.wrap_forward(dense, lambda inner, x: inner(x) + 1)
    return dense


def _jit(cell, x):
    @ms.jit
    def function(x):
        return cell(x) * 2

    return function(x)


def _bytecode(cell, x):
    @ms.jit(capture_mode="bytecode")
    def function(x):
        return cell(x) * 2

    return function(x)


def _trace(cell, x):
    @ms.jit(capture_mode="trace")
    def function(x):
        return cell(x) * 2

    return function(x)


def _graph_mode(cell, x):
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        return cell(x)
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


WAYS = {
    "jit": _jit,
    "bytecode": _bytecode,
    "vmap": lambda cell, x: ms.vmap(cell)(ops.stack([x, x])),
    "AutoParallel": lambda cell, x: AutoParallel(cell)(x),
    "graph mode": _graph_mode,
    "trace": _trace,  # the last, because an error leaves MindSpore's tracer on
}
MAKE = {"model": Model, "wrapped": _styled}


def _x():
    return Tensor(np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32))


def _said(cell, way):
    """How *way* ends, and whether the cell is what it was afterwards."""
    before = cell(_x()).asnumpy()
    try:
        return f"no error: {WAYS[way](cell, _x()).shape}"
    except Exception as error:
        if way != "trace":
            np.testing.assert_array_equal(cell(_x()).asnumpy(), before)
        return f"{type(error).__name__}: {error}"


def _parts(platform):
    """Largest deviation of values and gradients where the cells around the layer are compiled, each by itself."""
    model = Model(platform)
    up, down = ms.jit(model.up), ms.jit(model.down)
    weights = model.trainable_params()
    whole, parts = (
        ms.value_and_grad(lambda x, call=call: ops.sum(call(x) ** 2), 0, weights)(_x())
        for call in (model, lambda x: down(model.moe(up(x))))
    )
    pairs = zip((whole[0], whole[1][0], *whole[1][1]), (parts[0], parts[1][0], *parts[1][1]), strict=True)
    return max(float(np.abs(a.asnumpy() - b.asnumpy()).max() / np.abs(a.asnumpy()).max()) for a, b in pairs)


def main():
    """Every way with every cell, then the way out; printed as JSON on the last line."""
    platform = hyperep.get_platform("mindspore")
    deviation = _parts(platform)
    said = {way: {name: _said(make(platform), way) for name, make in MAKE.items()} for way in WAYS if way != "trace"}
    said["trace"] = {"model": _said(Model(platform), "trace")}
    print(json.dumps({"said": said, "deviation": deviation}), flush=True)
    os._exit(0)  # whatever is raised under the tracer, MindSpore aborts when Python ends


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    ended = subprocess.run(
        [sys.executable, __file__],  # from a file: the tracer reads the source of every frame
        cwd=tmp_path_factory.mktemp("compiled"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("way", WAYS)
def test_it_is_refused_in_words_and_the_process_lives_on(outcome, way):
    for name, said in outcome["said"][way].items():
        assert said.startswith("RuntimeError"), (name, said[:400])
        assert REFUSED in said, (name, said[:400])
        assert "Leave it out of ms.jit, ms.vmap and AutoParallel" in said


def test_the_cells_around_the_layer_can_be_compiled(outcome):
    assert outcome["deviation"] < 1e-4


if __name__ == "__main__":
    main()
