# SPDX-License-Identifier: Apache-2.0
"""Which modules of a model are experts, by what they are made of and how they are called; not by a list of names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor import DTensor

from hyperep_torch.transformers.kernels import declares_its_layout

__all__ = ["StockExperts", "find_experts"]


@dataclass(frozen=True)
class StockExperts:
    """A module of experts that is called as ``experts(tokens, indices, weights)``."""

    path: str
    module: nn.Module
    num_experts: int
    grouped: bool
    """Whether its weights can be computed by grouped products; else its own forward is called."""


def find_experts(model: nn.Module) -> list[StockExperts]:
    """The experts in *model*, in its order.

    Raises:
        ValueError: there are none, or modules that look like experts and are of a form that is not known.
    """
    found, unknown = [], []
    for path, module in model.named_modules():
        if any(path.startswith(outer.path + ".") for outer in found):
            continue
        if (experts := _as_experts(path, module)) is not None:
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
            "experts(hidden_states, top_k_index, top_k_weights); make yours one, or apply hyperep_torch.ExpertParallel to "
            "a module of your own"
        )
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no experts that could be spread: no module whose parameters all have the "
            "expert in dim 0 and that is called as experts(hidden_states, top_k_index, top_k_weights)"
        )
    return found


def _as_experts(path: str, module: nn.Module) -> StockExperts | None:
    parameters = list(module.parameters())
    if not parameters or not hasattr(module, "num_experts") or not _takes_tokens(module):
        return None
    # From the parameters, because the attribute is the number of this rank's once experts are spread.
    numbers = {parameter.shape[0] if parameter.ndim > 1 else 0 for parameter in parameters}
    number = numbers.pop()
    if numbers or number < 2 or (number != module.num_experts and not isinstance(parameters[0], DTensor)):
        return None
    return StockExperts(path, module, number, declares_its_layout(module))


def _takes_tokens(module: nn.Module) -> bool:
    """Whether its forward takes three inputs, of which the last two route the first."""
    if "tokens" in getattr(module, "takes", ()):
        return True
    given = [p.name for p in inspect.signature(type(module).forward).parameters.values() if p.name != "self"]
    return len(given) == 3 and given[1].endswith(("index", "indices")) and given[2].endswith("weights")


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
