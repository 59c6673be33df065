# SPDX-License-Identifier: Apache-2.0
"""Faulty platforms, each with one fault that has been seen somewhere, and the requirement that must find it.

A platform with ``core`` puts its fault into the core that runs on it: for each ``module:name`` what makes another
function of the one there. It stands for a platform on which that step comes out so.
"""

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass

from hyperep.conformance.target import Target
from hyperep.loopback.array_namespace import array_namespace
from hyperep.loopback.launch import LoopbackLauncher, run
from hyperep.loopback.platform import CAPABILITIES


@dataclass(frozen=True)
class Mutant:
    platform: type
    requirement: str
    """The requirement that names the fault."""
    ranks: int = 2
    says: str = ""
    """Words that the finding must contain."""
    deadline: float = 20.0


MUTANTS: dict[str, Mutant] = {}


def mutant(requirement: str, **options) -> Callable[[type], type]:
    def add(platform: type) -> type:
        MUTANTS[platform.__name__] = Mutant(platform, requirement, **options)
        return platform

    return add


class MutantLauncher(LoopbackLauncher):
    """Loopback ranks whose platform is turned into the mutant's before anything runs."""

    def __init__(self, name: str) -> None:
        self.name = name

    def host(self, process, function, platform_name):
        mutated = MUTANTS[self.name].platform
        for place, change in getattr(mutated, "core", {}).items():  # this process is the mutant's own
            module, name = place.split(":")
            module = importlib.import_module(module)
            setattr(module, name, change(getattr(module, name)))

        def on_rank(platform):
            platform.__class__ = mutated
            return function(platform)

        return run(on_rank, len(process.ranks))


def target(name: str, **options) -> Target:
    declared = {c.value: s.value for c, s in CAPABILITIES.items()}
    return Target(name="loopback", launcher=MutantLauncher(name), declared=declared, **options)


def namespace(**functions):
    made = copy.copy(array_namespace)
    for name, function in functions.items():
        setattr(made, name, function)
    return made
