# SPDX-License-Identifier: Apache-2.0
"""Agreement: what every rank must be told alike is compared before anything depends on it.

For calls that are made once, as when a module is distributed, and not for every step: they may cost a collective and a
copy to the host. A rank that was told otherwise would else send tensors of a size that its peers do not expect, which
ends a process or leaves them waiting.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from hyperep.mesh import DeviceMesh

__all__ = ["require_agreement"]


def require_agreement(mesh: DeviceMesh, call: str, said: Sequence[str], noted: bytes = b"") -> int | None:
    """Check that all ranks of *mesh* say the same; the same outcome on all of them. Collective over the mesh.

    Ranks compare digests, which have one size whatever they say; only if these differ do they tell each other what it
    was.

    Args:
        mesh: of any number of dimensions.
        call: which call it is, as the error names it.
        said: what was given to this rank, in parts, of which the error shows the first that differs.
        noted: what may differ, but is compared as well, since it costs no more.

    Returns:
        The first rank that noted something else than the first rank; ``None`` if there is none.

    Raises:
        ValueError: on all ranks, with the first rank that says something else than the first rank.
    """
    text = json.dumps(list(said))
    digest = np.concatenate([_digest(text.encode()), _digest(noted)])  # [8]
    digests = _gathered(mesh, digest)  # [R, 8]
    if (digests[:, :4] == digest[:4]).all():
        # Whoever sees a digest that is not its own sees that ranks differ; and then all of them do.
        others = mesh.ranks.ravel()[(digests[:, 4:] != digests[0, 4:]).any(axis=1)]
        return int(others[0]) if len(others) else None
    encoded = text.encode()
    length = int(_gathered(mesh, np.array([len(encoded)])).max())
    padded = encoded.ljust(-(-length // 8) * 8)
    texts = [row.tobytes().decode() for row in _gathered(mesh, np.frombuffer(padded, dtype=np.int64))]
    first = json.loads(texts[0])
    position = next(p for p, other in enumerate(texts) if other.strip() != texts[0].strip())
    pairs = zip_longest(json.loads(texts[position]), first, fillvalue="nothing more")
    here, there = next(pair for pair in pairs if pair[0] != pair[1])
    ranks = mesh.ranks.ravel().tolist()
    raise ValueError(
        f"{call}: rank {ranks[position]} has {here}, but rank {ranks[0]} has {there}; "
        "give the same on all ranks of the mesh"
    )


def _digest(content: bytes) -> np.ndarray:
    """Int64 ``[4]``."""
    return np.frombuffer(hashlib.sha256(content).digest(), dtype=np.int64)


def _gathered(mesh: DeviceMesh, values: np.ndarray) -> np.ndarray:
    """The *values* ``[n]`` of every rank of the mesh, in the order of its ranks: ``[R, n]``."""
    platform = mesh.platform
    gathered: Any = platform.from_host(values.astype(np.int64)[None])
    for dimension in reversed(range(mesh.ndim)):  # the last dimension varies fastest
        gathered = platform.all_gather(gathered, mesh.get_group(dimension))
    return platform.to_host(gathered)[0]
