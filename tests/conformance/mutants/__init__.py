# SPDX-License-Identifier: Apache-2.0
"""Faulty platforms, each with one fault that has been seen somewhere, and the requirement that must find it."""

from mutants import arrays, autodiff, communication, declarations, modules, narrow, rows, tokens
from mutants.registry import MUTANTS, target

__all__ = [
    "MUTANTS",
    "arrays",
    "autodiff",
    "communication",
    "declarations",
    "modules",
    "narrow",
    "rows",
    "target",
    "tokens",
]
