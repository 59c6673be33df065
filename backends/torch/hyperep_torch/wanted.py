# SPDX-License-Identifier: Apache-2.0
"""Which gradients a call of backward is asked for.

``ctx.needs_input_grad`` is decided in forward: a weight that requires a gradient is in it at every backward. But
``torch.autograd.grad`` may ask for inputs alone, and for weights later: that is how pipeline schedules without bubbles
split the backward (Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024). The engine knows what it will run, so that
each product is computed in one of the two passes, as PyTorch's own operators do.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["wanted_gradients"]


def wanted_gradients(ctx: Any, first: int = 0) -> tuple[bool, ...]:
    """For each input of ``forward`` from the number *first* on, whether this backward needs its gradient.

    Args:
        ctx: of a ``torch.autograd.Function``, in its backward.
        first: how many inputs come before the first tensor; after it tensors come first, and others last.
    """
    needed = ctx.needs_input_grad[first:]
    if torch.compiler.is_compiling():  # the graph serves every backward
        return needed
    nodes = ctx.next_functions
    return tuple(n and (i >= len(nodes) or _is_run(nodes[i][0])) for i, n in enumerate(needed))


def _is_run(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # PyTorch refuses the question for a leaf that torch.autograd.grad was given, and the answer is that.
        return True
