# SPDX-License-Identifier: Apache-2.0
"""What runs on the ranks: the actions of one examination, whose results go home as plain NumPy arrays."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hyperep.audit.subject import Call, NotOffered, Specimen, Subject
from hyperep.launch.doing import doing
from hyperep.launch.steps import step_done
from hyperep.platform.reference import resolve

__all__ = ["examine", "layer_of", "prepare", "subject_of"]


def subject_of(given: Any) -> Subject:
    """The subject that ``"module:name"`` names, or that was given.

    Raises:
        ValueError: it is none.
    """
    found = resolve(given) if isinstance(given, str) else given
    if not isinstance(found, Subject):
        raise ValueError(
            f"{given!r} is {type(found).__module__}.{type(found).__qualname__}, which is no subject; make one with "
            "hyperep_torch.audit.ModuleSubject or hyperep.audit.PlatformSubject"
        )
    return found


def prepare(platform: Any, *, subject: Any) -> None:
    """Import what an examination needs."""
    subject_of(subject)


def examine(
    platform: Any,
    *,
    subject: Any,
    actions: Sequence[Sequence[str]],
    weights: Sequence[Mapping[str, np.ndarray]],
    tokens: Mapping[str, Sequence[np.ndarray]],
    cotangents: Mapping[str, Sequence[np.ndarray]],
    seed: int,
    folder: str,
) -> dict[str, Any]:
    """Carry out *actions* on this rank.

    Args:
        platform: of this rank.
        subject: the subject, or where it is.
        actions: of the examination.
        weights: of each layer, whole.
        tokens: batch -> the tokens of each rank.
        cotangents: batch -> the cotangents of each rank.
        seed: for initial weights.
        folder: for checkpoints.

    Returns:
        ``outcome``: ``"done"``, ``"not offered"`` or ``"raised"``, the latter two with ``message``, and ``raised`` with
        ``action``, ``where`` and ``traceback``; and ``found``, what was observed, by label.
    """
    theatre = None
    doing("build")
    try:
        theatre = _Theatre(subject_of(subject), platform, weights, tokens, cotangents, seed, folder)
        for action in actions:
            theatre.act(action)
            step_done()
    except NotOffered as error:
        return {"outcome": "not offered", "message": str(error), "found": {}}
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        return {
            "outcome": "raised",
            "message": f"{type(error).__name__}: {error}",
            "action": " ".join(theatre.now) if theatre else "build",
            "where": " < ".join(f"{f.name} ({f.filename.rpartition('/')[2]}:{f.lineno})" for f in frames[:-4:-1]),
            "traceback": "".join(traceback.format_exception(error)),
            "found": theatre.found if theatre else {},
        }
    return {"outcome": "done", "found": theatre.found}


class _Theatre:
    """The layers of one examination on this rank, and what was seen of them."""

    def __init__(
        self,
        subject: Subject,
        platform: Any,
        weights: Sequence[Mapping[str, np.ndarray]],
        tokens: Mapping[str, Sequence[np.ndarray]],
        cotangents: Mapping[str, Sequence[np.ndarray]],
        seed: int,
        folder: str,
    ) -> None:
        self.found: dict[str, Any] = {}
        self.now: Sequence[str] = ("build",)
        self._subject, self._platform, self._seed, self._folder = subject, platform, seed, folder
        rank = platform.rank
        self._tokens = {batch: each[rank] for batch, each in tokens.items()}
        self._cotangents = {batch: each[rank] for batch, each in cotangents.items()}
        self._specimens = [subject.build(platform, of_layer, seed) for of_layer in weights]
        self._calls: dict[str, tuple[Specimen, Call]] = {}
        self._verbs: dict[str, Callable[..., None]] = {
            verb: getattr(self, f"_{verb}")
            for verb in (
                [
                    "forward",
                    "backward",
                    "finish",
                    "gradients",
                    "zero",
                    "drop",
                    "freeze",
                    "norm",
                    "step",
                    "weights",
                    "save",
                    "load",
                    "initial",
                    "memory",
                ]
            )
        }

    def act(self, action: Sequence[str]) -> None:
        self.now = action
        doing(" ".join(action))
        self._verbs[action[0]](*action[1:])

    def _of(self, layer: str) -> Specimen:
        return self._specimens[int(layer)]

    def _forward(self, batch: str, mode: Any = "train", layer: str = "") -> None:
        specimen = self._of(layer or layer_of(batch))
        call = specimen.forward(self._tokens[batch].copy(), mode)
        self.found[f"output:{batch}"] = call.output
        self.found[f"after:{batch}"] = call.tokens_after
        self._calls[batch] = (specimen, call)

    def _backward(self, batch: str) -> None:
        specimen, call = self._calls[batch]
        self.found[f"tokens:{batch}"] = specimen.backward(call.handle, self._cotangents[batch].copy())

    def _finish(self, layer: str = "0") -> None:
        self._of(layer).finish()

    def _gradients(self, label: str, layer: str = "0") -> None:
        self.found[f"gradients:{label}"] = dict(self._of(layer).gradients())

    def _zero(self) -> None:
        for specimen in self._specimens:
            specimen.zero()

    def _drop(self) -> None:
        self._calls.clear()

    def _freeze(self, kind: str) -> None:
        for specimen in self._specimens:
            specimen.freeze(kind)

    def _norm(self, label: str) -> None:
        self.found[f"norm:{label}"] = np.float64(self._specimens[0].gradient_norm())

    def _step(self, layer: str = "0") -> None:
        self.found["optimizer"] = dict(self._of(layer).optimizer())
        self._of(layer).step()

    def _weights(self, label: str, layer: str = "0") -> None:
        self.found[f"weights:{label}"] = dict(self._of(layer).weights())

    def _save(self) -> None:
        self._specimens[0].save(self._folder)
        self._platform.barrier()

    def _load(self, layer: str) -> None:
        self._of(layer).load(self._folder)

    def _initial(self) -> None:
        self.found["initial"] = dict(self._subject.build(self._platform, None, self._seed).weights())

    def _memory(self, label: str) -> None:
        self.found[f"memory:{label}"] = np.float64(self._specimens[0].kept_bytes())


def layer_of(batch: str) -> str:
    """The layer that a batch is for, by the number at the end of its name; the first one without."""
    return batch[-1] if batch[-1].isdigit() else "0"
