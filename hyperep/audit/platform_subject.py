# SPDX-License-Identifier: Apache-2.0
"""``PlatformSubject``: a module of any hyperep platform as a subject."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hyperep.audit.claims import Claims
from hyperep.audit.shown import Shown
from hyperep.audit.subject import Call, Mode, NotOffered, Part, Specimen, part_of_rank

__all__ = ["PlatformSubject"]

Arrays = Mapping[str, np.ndarray]


def _call(module: Any, tokens: Any) -> Any:
    return module(tokens)


def _same(arrays: Arrays) -> Arrays:
    return arrays


@dataclass(frozen=True, kw_only=True)
class PlatformSubject:
    """A layer made with the :class:`hyperep.Platform` protocol.

    Its gradients are those of ``platform.vjp``, added up over calls. A parameter is held whole, or in equal shares of
    dim 0 in the order of ranks.
    """

    make: Callable[[Any, Claims], Any]
    """``make(platform, claims)``: the module on this rank, sharded, with any weights."""
    names: Mapping[str, str]
    """The claims' name of each weight -> the parameter's, as ``platform.parameters`` has it."""
    claims: Claims = field(default_factory=Claims)
    platform: str = "loopback"
    name: str = ""
    """In reports; empty for that of the subject in its module."""
    call: Callable[[Any, Any], Any] = _call
    """``call(module, tokens [T, D]) -> [T, D]``."""
    reduce: Callable[[Any, dict[str, Any]], dict[str, Any]] | None = None
    """``reduce(platform, gradients) -> gradients``, by the parameters' names: what you do between backward and the
    optimizer. An entry may be ``None``."""
    norm: Callable[[Any, dict[str, Any]], float] | None = None
    """``norm(platform, gradients)``, after that."""
    to_layer: Callable[[Arrays], Arrays] = _same
    """From whole weights by the claims' names and shapes to those of the layer; names may be left to :attr:`names`."""
    from_layer: Callable[[Arrays], Arrays] = _same
    """The way back, for gradients too."""

    def build(self, platform: Any, weights: Arrays | None, seed: int) -> Specimen:  # noqa: D102
        module = self.make(platform, self.claims)
        specimen = _PlatformSpecimen(self, platform, module)
        if weights is not None:
            specimen.assign({self.names.get(k, k): v for k, v in self.to_layer(dict(weights)).items()})
        return specimen

    def canonical(self, arrays: Arrays) -> Arrays:  # noqa: D102
        back = {theirs: ours for ours, theirs in self.names.items()}
        return self.from_layer({back.get(name, name): array for name, array in arrays.items()})

    def script(self, shown: Shown) -> str:  # noqa: D102
        raise NotOffered("scripts are written of layers of PyTorch only")


class _PlatformSpecimen(Specimen):
    def __init__(self, subject: PlatformSubject, platform: Any, module: Any) -> None:
        self._subject, self._platform, self._module = subject, platform, module
        self._parameters: dict[str, Any] = dict(platform.parameters(module))
        shapes = subject.to_layer({name: np.zeros(shape) for name, shape in subject.claims.shapes.items()})
        self._whole = {subject.names.get(name, name): array.shape for name, array in shapes.items()}
        missing = sorted(set(self._whole) - set(self._parameters))
        if missing:
            raise ValueError(
                f"the module has no parameters {missing}; it has {sorted(self._parameters)}: names= must give the "
                "parameter of each weight that is claimed"
            )
        self._gradients: dict[str, Any] = {}

    def assign(self, whole: Arrays) -> None:
        """Give every parameter its part of the whole."""
        for name, value in whole.items():
            part = self._part(name, None)
            where = tuple(slice(a, a + n) for a, n in zip(part.start, part.shape, strict=True))
            mine = np.ascontiguousarray(value[where], dtype=np.float32)
            self._platform.assign(self._parameters[name], self._platform.from_host(mine))

    def _part(self, name: str, value: np.ndarray | None) -> Part:
        local = self._platform.local(self._parameters[name])
        return part_of_rank(value, tuple(local.shape), self._whole[name], self._platform.rank)

    def forward(self, tokens: np.ndarray, mode: Mode) -> Call:
        if mode == "recompute":
            raise NotOffered("recompute is the framework's own")
        x = self._platform.from_host(tokens.astype(np.float32))
        names = list(self._whole)
        if mode == "evaluate":
            out, pullback = self._subject.call(self._module, x), None
        else:
            parameters = [self._parameters[name] for name in names]
            out, pullback = self._platform.vjp(
                lambda given: self._subject.call(self._module, given), x, parameters=parameters
            )
        output, after = self._platform.to_host(out, x)
        return Call(output=output, tokens_after=after, handle=(pullback, names, out))

    def backward(self, handle: Any, cotangent: np.ndarray) -> np.ndarray | None:
        pullback, names, out = handle
        like = self._platform.xp.astype(self._platform.from_host(cotangent.astype(np.float32)), out.dtype)
        of_tokens, *gradients = pullback(like)
        for name, gradient in zip(names, gradients, strict=True):
            self._gradients[name] = self._gradients[name] + gradient if name in self._gradients else gradient
        return self._platform.to_host(of_tokens)[0]

    def finish(self) -> None:
        if self._subject.reduce is not None:
            self._gradients = self._subject.reduce(self._platform, self._gradients)

    def gradients(self) -> Mapping[str, Part]:
        found = {}
        for name in self._whole:
            gradient = self._gradients.get(name)
            found[name] = self._part(name, None if gradient is None else self._platform.to_host(gradient)[0])
        return found

    def zero(self) -> None:
        self._gradients = {}

    def weights(self) -> Mapping[str, Part]:
        return {
            name: self._part(name, self._platform.to_host(self._platform.local(self._parameters[name]))[0])
            for name in self._whole
        }

    def gradient_norm(self) -> float:
        if self._subject.norm is None:
            raise NotOffered("the subject has no norm=")
        return float(self._subject.norm(self._platform, self._gradients))
