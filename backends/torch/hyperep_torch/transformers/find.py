# SPDX-License-Identifier: Apache-2.0
"""Which modules of a model are experts, by what they are made of and how they are called; not by a list of names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from hyperep_torch.adapters import require_spreadable, unwrapped
from hyperep_torch.transformers.forms import FORMS, Called, Form

__all__ = ["StockExperts", "find_experts"]


@dataclass(frozen=True)
class StockExperts:
    """A module of experts in a model."""

    path: str
    module: nn.Module
    block: nn.Module | None
    """What holds the module."""
    num_experts: int
    form: Form
    outer: str
    """The path of what is called: the same, or that of peft's wrappers around parameters of the module."""
    wrappers: tuple[nn.Module, ...]
    """These, from the outermost on."""


def find_experts(model: nn.Module) -> list[StockExperts]:
    """The experts in *model*, in its order.

    Raises:
        ValueError: there are none, or modules that look like experts and are of a form that is not known, or that carry
            adapters of peft that cannot be spread.
    """
    modules = dict(model.named_modules())
    found: list[StockExperts] = []
    unknown: list[tuple[str, nn.Module]] = []
    for path, module in modules.items():
        if any(path.startswith(outer.path + ".") for outer in found):
            continue
        if (experts := _as_experts(path, module, modules)) is not None:
            if experts.wrappers and not isinstance(experts.form, Called):
                raise ValueError(
                    f"{type(model).__name__}: {experts.outer!r} has adapters of peft on its own parameters, which are "
                    f"not spread for experts of its form ({type(experts.form).__name__}); leave them out of "
                    "target_parameters"
                )
            require_spreadable(experts.wrappers, experts.module)
            found.append(experts)
        elif _looks_like_experts(path, module):
            unknown.append((path, module))
    unknown = [(path, module) for path, module in unknown if not any(e.path.startswith(path + ".") for e in found)]
    if unknown:
        told = "; ".join(f"{path!r}: {_form(module)}" for path, module in unknown[:3])
        raise ValueError(
            f"{type(model).__name__} has experts of a form that is not known here, {told}"
            + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
            + ". Known are modules whose parameters all have the expert in dim 0 and that are called as "
            "experts(hidden_states, top_k_index, top_k_weights); make yours one, or apply "
            "hyperep_torch.ExpertParallel to a module of your own"
        )
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no experts that could be spread: no module whose parameters all have the "
            "expert in dim 0 and that is called as experts(hidden_states, top_k_index, top_k_weights)"
        )
    return found


def _as_experts(path: str, module: nn.Module, modules: dict[str, nn.Module]) -> StockExperts | None:
    for form in FORMS:
        if (number := form.count(module)) is not None:
            outer = path
            while outer.endswith(".base_layer") and unwrapped(modules[outer.removesuffix(".base_layer")])[0]:
                outer = outer.removesuffix(".base_layer")
            block = modules[outer.rpartition(".")[0]] if outer else None
            return StockExperts(path, module, block, number, form, outer, tuple(unwrapped(modules[outer])[0]))
    return None


def _looks_like_experts(path: str, module: nn.Module) -> bool:
    named = path.rpartition(".")[2] == "experts" or type(module).__name__.endswith(("Experts", "ParallelExperts"))
    shared = "shared" in path.rpartition(".")[2] or "Shared" in type(module).__name__
    return named and not shared and any(True for _ in module.parameters())


def _form(module: nn.Module) -> str:
    shapes: Iterator[str] = (f"{name} {tuple(p.shape)}" for name, p in module.named_parameters())
    inputs = ", ".join(str(p.name) for p in inspect.signature(type(module).forward).parameters.values())
    listed = list(shapes)
    more = f", ... ({len(listed)} parameters)" if len(listed) > 4 else ""
    return f"{type(module).__name__} with {', '.join(listed[:4])}{more}, called as forward({inputs})"
