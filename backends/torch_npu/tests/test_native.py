# SPDX-License-Identifier: Apache-2.0
"""The operators that torch_npu adds, as the platform uses them: schemas, values, gradients, and their fallback."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hyperep_torch_npu.operators import SCHEMAS
from measure import relative, rows
from npu_programs import counted_operators, sorted_dtypes

from hyperep.moe import MoEConfig, RouterConfig, build_moe

SIZES = [3, 0, 5, 1]
GROUPED, GATHERED = "npu_grouped_matmul", "npu_moe_token_unpermute"


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_wheel_has_the_operators_that_are_called(name):
    assert str(getattr(torch.ops.npu, name).default._schema) == SCHEMAS[name]


def products(platform, sizes, dtype):
    """Grouped product, its gradients, and the same by a loop in NumPy."""
    x, weight, g = rows(1, sum(sizes), 6), rows(2, len(sizes), 8, 6), rows(3, sum(sizes), 8)
    tensors = [platform.from_host(a).to(dtype) for a in (x, weight, g)]
    x, weight, g = (platform.to_host(t)[0].astype(np.float64) for t in tensors)  # as rounded
    runs = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    expected = (
        np.concatenate([x[run] @ w.T for run, w in zip(runs, weight, strict=True)]),
        np.concatenate([g[run] @ w for run, w in zip(runs, weight, strict=True)]),
        np.stack([g[run].T @ x[run] for run in runs]),
    )
    group_sizes = platform.from_host(np.array(sizes))
    y, pullback = platform.vjp(lambda x, w: platform.grouped_matmul(x, w, group_sizes), *tensors[:2])
    return platform.to_host(y, *pullback(tensors[2])), expected


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
@pytest.mark.parametrize("sizes", [SIZES, [4], [0, 0, 2]])
def test_grouped_matmul_and_its_gradients(platform, sizes, dtype, tolerance):
    results = []
    calls = counted_operators(platform, lambda: results.append(products(platform, sizes, dtype)))
    found, expected = results[0]
    for value, reference in zip(found, expected, strict=True):
        assert relative(value.astype(np.float64), reference) < tolerance
    # Of one group it is a plain product: a list of one is not for the operator.
    assert calls.get(GROUPED, 0) == (0 if len(sizes) == 1 else 3)


def test_what_the_operator_does_not_take_goes_round_it(platform):
    calls = counted_operators(platform, lambda: products(platform, [0, 0], torch.float32))
    assert GROUPED not in calls
    sizes = platform.from_host(np.array(SIZES))
    with pytest.raises(ValueError, match="must be"):
        platform.grouped_matmul(platform.from_host(rows(1, 3, 4)), platform.from_host(rows(2, 4, 8, 5)), sizes)


def refuse(read):
    """A way to the host that devices may not go; the emulated device's own kernels look at CPU tensors."""

    def guarded(self, *args):
        assert self.device.type != "npu", "the host read the device"
        return read(self, *args)

    return guarded


def test_the_host_does_not_read_the_sizes(platform, monkeypatch):
    tensors = [platform.from_host(a) for a in (rows(1, 9, 6), rows(2, 4, 8, 6), np.array(SIZES))]
    for name in ("tolist", "cpu", "item", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, refuse(getattr(torch.Tensor, name)))
    platform.grouped_matmul(*tensors)


def test_a_layer_sorts_no_integers(platform):
    """Sorts that CANN does on the AI CPU."""
    router = RouterConfig(num_experts=8, top_k=2, num_groups=4, top_groups=2)
    layer = build_moe(platform, MoEConfig(dim=4, hidden_dim=6, router=router, capacity_factor=1.0))
    x = platform.from_host(rows(1, 32, 4))
    found = sorted_dtypes(lambda: layer(x, with_stats=True))
    assert found
    assert all(dtype.is_floating_point for dtype in found), found


@pytest.mark.parametrize(
    ("dtype", "native"), [(torch.bfloat16, 2), (torch.float16, 2), (torch.float32, 2), (torch.float64, 0)]
)
def test_permuting_rows_and_its_gradient(platform, dtype, native):
    order = np.array([4, 0, 3, 1, 2])
    x, g = (platform.from_host(rows(seed, 5, 6)).to(dtype) for seed in (1, 2))
    index, inverse = platform.from_host(order), platform.from_host(np.argsort(order))
    found = []

    def run():
        y, pullback = platform.vjp(lambda x: platform.permute_rows(x, index, inverse), x)
        # An expanded cotangent is what a sum hands over.
        found.extend(platform.to_host(y, *pullback(g.t().contiguous().t())))

    calls = counted_operators(platform, run)
    host_x, host_g = platform.to_host(x, g)
    np.testing.assert_array_equal(found[0], host_x[order])
    np.testing.assert_array_equal(found[1], host_g[np.argsort(order)])
    assert calls.get(GATHERED, 0) + calls.get("_" + GATHERED, 0) == native
