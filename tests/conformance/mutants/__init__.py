# SPDX-License-Identifier: Apache-2.0
"""Faulty platforms, each with one fault that has been seen somewhere, and the requirement that must find it."""

from mutants import (  # noqa: F401 (what they define is in the registry)
    arrays,
    autodiff,
    communication,
    declarations,
    modules,
    narrow,
    nested,
    one_sided,
    order,
    ownership,
    rows,
    shards,
    sizes,
    state,
    subgroups,
    tokens,
)
from mutants.registry import MUTANTS, target

__all__ = ["MUTANTS", "target"]
