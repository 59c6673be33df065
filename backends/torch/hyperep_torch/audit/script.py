# SPDX-License-Identifier: Apache-2.0
"""A script that shows a finding by PyTorch and NumPy alone: the layer, the input, a dense reference, a comparison."""

from __future__ import annotations

import inspect
import pprint
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from hyperep.audit.claims import RELU_MLP, SWIGLU, Claims
from hyperep.audit.inputs import coarse, weights_of
from hyperep.audit.shown import Shown
from hyperep.audit.subject import NotOffered
from hyperep_torch.audit import script_parts
from hyperep_torch.audit.source import folder_of, name_in_source, source_without_audit

if TYPE_CHECKING:
    from hyperep_torch.audit.module_subject import ModuleSubject

__all__ = ["script_of"]

_EXPERTS = {
    id(SWIGLU): "return (F.silu(x @ w['w1'].mT) * (x @ w['w3'].mT)) @ w['w2'].mT",
    id(RELU_MLP): "return F.relu(x @ w['w1'].mT + w['b1']) @ w['w2'].mT + w['b2']",
}
_DEFAULTS = "hyperep_torch.audit.module_subject"
"""Where functions come from that do nothing."""
_NAMELESS = "cannot be named in a script: let it be a function that stands by itself in a module, with def"
_VERBS = {"forward", "backward", "finish", "gradients", "zero", "freeze"}


def script_of(subject: ModuleSubject, shown: Shown) -> str:
    """The script.

    Raises:
        NotOffered: the layer's source cannot be had, or the script would need more than is here. Experts are those
            that the audit knows by name; capacities, optimizers and checkpoints are left out.
    """
    claims, module = subject.claims, getattr(subject.make, "__module__", "")
    more = {action[0] for action in shown.actions} - _VERBS
    if more:
        raise NotOffered(f"scripts know nothing of {', '.join(sorted(more))}")
    if claims.capacity is not None or claims.weighting != "output":
        raise NotOffered("scripts know neither capacities nor scores on inputs")
    if id(claims.expert) not in _EXPERTS:
        raise NotOffered("scripts know no experts but SWIGLU and RELU_MLP")
    functions = {"CALL": subject.call, "REDUCE": subject.reduce}
    functions |= {"TO_LAYER": subject.to_layer, "FROM_LAYER": subject.from_layer}
    make = name_in_source(subject.make, module)
    layer = source_without_audit(subject.make) if make is not None else None
    if layer is None:
        raise NotOffered(f"make {_NAMELESS}")
    given = {key: f for key, f in functions.items() if f is not None and f.__module__ != _DEFAULTS}
    named = {key: name_in_source(f, f.__module__) for key, f in given.items()}
    nameless = [key.lower() for key, name in named.items() if name is None]
    if nameless:  # left out, they would let the script show something else
        raise NotOffered(f"{nameless[0]} {_NAMELESS}")
    elsewhere = [f for f in dict.fromkeys(given.values()) if f.__module__ != module]
    lines = [textwrap.dedent(inspect.getsource(function)) for function in elsewhere]
    lines += [f"{key} = {named.get(key)}" for key in functions]
    constants = {
        "RANKS": shown.ranks,
        "LAYERS": shown.layers,
        "SEED": shown.seed,
        "DTYPE": f"torch.{claims.precision}",
        "SHAPES": dict(claims.shapes),
        "NAMES": dict(subject.names),
        "SCALE": claims.scale,
        "TOLERANCE": claims.tolerance,
        "SHARED_BATCH": claims.batch == "shared",
        "MEAN": claims.reduction == "mean",
        "OWN": claims.replicated == "own",
        "ACTIONS": [list(action) for action in shown.actions],
    }
    told = [
        f"{key} = {value if key == 'DTYPE' else pprint.pformat(value, width=110)}" for key, value in constants.items()
    ]
    kept = inspect.getsource(script_parts).partition("# --- from here on\n")[2]
    choose = "logits.sigmoid()" if claims.scores == "sigmoid" else "logits.softmax(-1)"
    divide = "kept / kept.sum(-1, keepdim=True)" if claims.normalize else "kept"
    kept = (
        kept.replace("_scores(logits)", choose)
        .replace("_divided(kept)", divide)
        .replace("return _expert(w, x)", _EXPERTS[id(claims.expert)])
    )
    return "\n".join(
        [
            f'"""{shown.title}.\n\n{shown.reason or "Run it with python; it needs torch and NumPy."}\n"""',
            _IMPORTS.replace("FOLDER", repr(folder_of(subject.make))),
            "# ---------------------------------------------------------------- the layer, as its author wrote it",
            layer,
            "\n\n# ---------------------------------------------------------------- the input",
            f"CLAIMS = {_claims(claims)}",
            f"make = {make}",
            *lines,
            *told,
            f"TOKENS = {_numbers(shown.tokens)}",
            f"COTANGENTS = {_numbers(shown.cotangents)}",
            "\n",
            inspect.getsource(coarse),
            "\n",
            inspect.getsource(weights_of).replace("Mapping[str, tuple[int, ...]]", "dict"),
            "\n# ---------------------------------------------------------------- what should come out, and what does",
            kept,
        ]
    )


_IMPORTS = """import faulthandler
import sys
import tempfile
import zlib
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, distribute_tensor

sys.path.insert(0, FOLDER)
"""


def _claims(claims: Claims) -> str:
    sizes = ", ".join(f"{name}={value}" for name, value in vars(claims.sizes).items())
    rest = ", ".join(f"{name}={value!r}" for name, value in vars(claims).items() if name not in ("sizes", "expert"))
    return f"SimpleNamespace(sizes=SimpleNamespace({sizes}), {rest})"


def _numbers(batches: Any) -> str:
    listed = {batch: [np.asarray(x, np.float64).tolist() for x in each] for batch, each in batches.items()}
    return pprint.pformat(listed, width=118, compact=True)
