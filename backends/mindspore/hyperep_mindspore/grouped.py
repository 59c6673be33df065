# SPDX-License-Identifier: Apache-2.0
"""Grouped products as one custom function each.

What they are made of, :class:`Products`, depends on the device: on Ascend it is CANN's grouped product, elsewhere a
loop over the groups that have rows, which reads the sizes on the host. Differentiating ``weight[e]`` in a loop would
make a full-size zero gradient for every group; here the backward makes one product per group instead.
"""

from __future__ import annotations

from typing import Any

from mindspore import Tensor

from hyperep_mindspore.autodiff import custom_vjp
from hyperep_mindspore.products import Products

__all__ = ["grouped_matmul", "grouped_swiglu"]


def grouped_matmul(products: Products, x: Tensor, weight: Tensor, group_sizes: Tensor) -> Tensor:
    """``[N, D] x [L, H, D] -> [N, H]``; see the protocol."""
    of, dtype = products, x.dtype
    groups = of.groups(group_sizes, x.shape[0])

    def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return of.close(of.by_run(of.open(x), of.open(weight), groups, transpose=True), dtype), (x, weight)

    def backward(residuals: Any, cotangents: Any, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        x, weight, g = (of.open(value) for value in (*residuals, *cotangents))
        grad_x = of.close(of.by_run(g, weight, groups, transpose=False), dtype) if needed[0] else None
        return grad_x, of.close(of.outer(g, x, weight, groups), residuals[1].dtype) if needed[1] else None

    return custom_vjp(forward, backward)(x, weight)


def grouped_swiglu(products: Products, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, group_sizes: Tensor) -> Tensor:
    """``(silu(x w1^T) * (x w3^T)) w2^T`` for each run of rows; see the protocol.

    Keeps the rows and the two projections; the hidden rows are computed again in backward, which is elementwise.
    """
    of, dtype = products, x.dtype
    groups = of.groups(group_sizes, x.shape[0])

    def forward(*inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, w1, w2, w3 = (of.open(value) for value in inputs)
        gate = of.by_run(x, w1, groups, transpose=True)  # [N, H]
        up = of.by_run(x, w3, groups, transpose=True)  # [N, H]
        out = of.by_run(gate * of.sigmoid(gate) * up, w2, groups, transpose=True)  # [N, D]
        return of.close(out, dtype), (*inputs, of.close(gate, dtype), of.close(up, dtype))

    def backward(residuals: Any, cotangents: Any, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        x, w1, w2, w3, gate, up, g = (of.open(value) for value in (*residuals, *cotangents))
        slope = of.sigmoid(gate)
        silu = gate * slope
        grad_hidden = of.by_run(g, w2, groups, transpose=False)  # [N, H]
        # d silu(z) / dz = s + z * s * (1 - s), where s is the sigmoid of z.
        grad_gate = grad_hidden * up * slope * (1.0 + gate * (1.0 - slope))
        grad_up = grad_hidden * silu
        grads = (
            lambda: of.by_run(grad_gate, w1, groups, transpose=False) + of.by_run(grad_up, w3, groups, transpose=False),
            lambda: of.outer(grad_gate, x, w1, groups),
            lambda: of.outer(g, silu * up, w2, groups),
            lambda: of.outer(grad_up, x, w3, groups),
        )
        return tuple(
            of.close(grad(), like.dtype) if wanted else None
            for grad, like, wanted in zip(grads, residuals[:4], needed, strict=True)
        )

    return custom_vjp(forward, backward)(x, w1, w2, w3)
