# SPDX-License-Identifier: Apache-2.0
"""Which parts a plan reaches, and which mesh their styles get."""

import pytest

import hyperep
from hyperep.loopback import run


class Recording(hyperep.ParallelStyle):
    """Remembers what it was applied to; a style of a user's own, with or without wishes for the mesh."""

    def __init__(self, *mesh_dim_names):
        self.seen = []
        if mesh_dim_names:
            self.mesh_dim_names = mesh_dim_names

    def apply(self, module, mesh):
        self.seen.append((module.name, mesh.mesh_dim_names))
        return module


def model(platform):
    """Modules that are named by their paths."""

    def module(path, *children):
        made = {child.name.split(".")[-1]: child for child in children}
        return platform.make_module(path, {}, lambda m, x: x, children=made)

    layers = [
        module(path, module(f"{path}.attention"), module(f"{path}.moe", module(f"{path}.moe.experts")))
        for path in ("layers.0", "layers.1", "layers.2")
    ]
    return module("", module("embedding"), module("layers", *layers))


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("", [""]),
        ("embedding", ["embedding"]),
        ("*", ["embedding", "layers"]),
        ("layers.*", ["layers.0", "layers.1", "layers.2"]),
        ("layers.*.moe.experts", ["layers.0.moe.experts", "layers.1.moe.experts", "layers.2.moe.experts"]),
        ("layers.[02].attention", ["layers.0.attention", "layers.2.attention"]),
        ("layers.1.*", ["layers.1.attention", "layers.1.moe"]),
        ("l*.?.*.exp*", ["layers.0.moe.experts", "layers.1.moe.experts", "layers.2.moe.experts"]),
    ],
)
def test_patterns(pattern, paths):
    def on_rank(platform):
        style = Recording()
        whole = model(platform)
        mesh = hyperep.init_device_mesh(platform, (1, 1), ("ep", "tp"))
        assert hyperep.parallelize_module(whole, mesh, {pattern: style}) is whole
        assert style.seen == [(path, ("ep", "tp")) for path in paths]

    run(on_rank, 1)


def test_a_style_alone_is_for_the_module_itself():
    def on_rank(platform):
        style = Recording()
        hyperep.parallelize_module(model(platform), hyperep.init_device_mesh(platform, (1,), ("ep",)), style)
        assert style.seen == [("", ("ep",))]

    run(on_rank, 1)


@pytest.mark.parametrize("wanted", [("tp",), ("ep",), ("ep", "tp")], ids="-".join)
def test_a_style_gets_the_dimensions_that_it_names(wanted):
    def on_rank(platform):
        style = Recording(*wanted)
        mesh = hyperep.init_device_mesh(platform, (1, 1), ("ep", "tp"))
        hyperep.parallelize_module(model(platform), mesh, {"embedding": style})
        assert style.seen == [("embedding", wanted)]

    run(on_rank, 1)


@pytest.mark.parametrize("bad", [Recording("cp"), Recording, None], ids=["no such dimension", "a class", "nothing"])
def test_an_entry_that_cannot_be_used_changes_nothing(bad):
    def on_rank(platform):
        style = Recording()
        mesh = hyperep.init_device_mesh(platform, (1, 1), ("ep", "tp"))
        with pytest.raises((TypeError, ValueError), match=r"plan entry 'layers\.0'"):
            hyperep.parallelize_module(model(platform), mesh, {"embedding": style, "layers.0": bad})
        assert style.seen == []

    run(on_rank, 1)
