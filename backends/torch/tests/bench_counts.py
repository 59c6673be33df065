# SPDX-License-Identifier: Apache-2.0
"""What one layer really asks of ``torch.distributed`` and of autograd, seen from one rank."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from hyperep.bench.data import Data
from hyperep.bench.layer import Layer
from hyperep.bench.shapes import Shape
from hyperep.mesh import init_device_mesh
from hyperep.styles import ExpertParallel

SHAPE = Shape(name="small", tokens=64, dim=32, hidden=16, experts=8, top_k=3)


def observe(platform: Any, exchange: str) -> dict[str, Any]:
    """Every collective of a layer's forward and of its backward, its copies to the host, and what autograd keeps."""
    mesh = init_device_mesh(platform, (platform.world_size,), ("ep",))
    layer = Layer(Data(platform, SHAPE, platform.rank), mesh, ExpertParallel(exchange=exchange))
    seen: dict[str, list[tuple[str, str, int]]] = {"forward": [], "backward": []}
    phase, copies, originals = ["forward"], [], {}

    def spy(name: str) -> Any:
        originals[name] = getattr(dist, name)

        def called(output: Any, *args: Any, **kwargs: Any) -> Any:
            sent = args[0] if args and isinstance(args[0], torch.Tensor) else output
            seen[phase[0]].append((name, str(sent.dtype), sent.numel() * sent.element_size()))
            return originals[name](output, *args, **kwargs)

        return mock.patch.object(dist, name, called)

    to_host = type(platform).to_host
    count_copies = mock.patch.object(type(platform), "to_host", lambda p, *t: copies.append(phase[0]) or to_host(p, *t))
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    names = [
        n for n in ("all_to_all_single", "all_to_all", "all_reduce", "broadcast", "all_gather") if hasattr(dist, n)
    ]
    with spy(names[0]), spy(names[1]), spy(names[2]), spy(names[3]), spy(names[4]), count_copies:
        with hooks:
            pullback = layer.forward_recorded()
        phase[0] = "backward"
        pullback()
    resident = {platform.local(p).untyped_storage().data_ptr() for p in layer.parameters.values()}
    storages = {t.untyped_storage().data_ptr(): t for t in kept}
    shapes = sorted(tuple(t.shape) for pointer, t in storages.items() if pointer not in resident)
    counts, copied = SHAPE.counts(2)[:, platform.rank].sum(), SHAPE.copies(2)
    return {
        "seen": seen,
        "copies": copies,
        "kept": shapes,
        "rows": int(counts),
        "sent": int(copied[platform.rank].sum()),
        "received": int(copied[:, platform.rank].sum()),
    }
