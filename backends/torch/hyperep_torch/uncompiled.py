# SPDX-License-Identifier: Apache-2.0
"""One break in a compiled graph, where there would be one for each collective.

How many tokens arrive is known on the host alone, and collectives of ``torch.distributed`` are not traced. So a layer
of experts that exchanges is left to eager PyTorch as a whole; its products are kernels already. What is before and
after it is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["call_uncompiled"]


def call_uncompiled(inner: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Any:
    """Call *inner*; a wrapper for :func:`hyperep_torch.wrapped.wrap_forward`."""
    if not torch.compiler.is_compiling():
        return inner(*inputs, **kwargs)
    # Here, because to mark a function for the compiler imports it, with Triton, which takes seconds.
    from hyperep_torch.graph_break import call

    return call(inner, *inputs, **kwargs)
