# SPDX-License-Identifier: Apache-2.0
"""What one layer really asks of ``torch.distributed`` and of autograd, seen from one rank."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from hyperep_torch import collectives

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
    phase, copies = ["forward"], []

    class Spy:
        """The functional collectives, with what each of them is given written down."""

        def __getattr__(self, name: str) -> Any:
            operator = getattr(torch.ops._c10d_functional, name)

            def called(x: torch.Tensor, *args: Any) -> Any:
                seen[phase[0]].append((name, str(x.dtype), x.numel() * x.element_size()))
                return operator(x, *args)

            return operator if name == "wait_tensor" else called

    to_host = type(platform).to_host
    count_copies = mock.patch.object(type(platform), "to_host", lambda p, *t: copies.append(phase[0]) or to_host(p, *t))
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with mock.patch.object(collectives, "_functional", Spy()), count_copies:
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
