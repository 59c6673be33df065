# SPDX-License-Identifier: Apache-2.0
"""``jax.numpy`` follows the Array API standard, but for a dtype."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["array_namespace"]


class _ArrayNamespace:
    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    @staticmethod
    def searchsorted(x1: jax.Array, x2: jax.Array, *, side: str = "left", sorter: Any = None) -> jax.Array:
        """Positions as int64, the default index dtype of the standard; JAX gives int32 for short arrays."""
        return jnp.searchsorted(x1, x2, side=side, sorter=sorter).astype(jnp.int64)


array_namespace = _ArrayNamespace()
