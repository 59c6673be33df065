# SPDX-License-Identifier: Apache-2.0
"""A program for a process in which no framework can be imported: list the platforms, then train a step on loopback.

Prints one line of JSON: the states of the platforms, the largest relative errors of expert parallelism over four ranks
against the unsharded layer, and the imports of frameworks that this step tried.
"""

import contextlib
import io
import json
import sys

import numpy as np

FRAMEWORKS = frozenset({"torch", "torch_npu", "mindspore", "jax", "tensorflow"})
RANKS, DIM, HIDDEN, EXPERTS, TOP_K, TOKENS = 4, 5, 7, 8, 2, 9


def states():
    """Each platform's state, as ``hyperep platforms --json`` prints it."""
    from hyperep.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main(["platforms", "--json"])
    return {record["name"]: record["state"] for record in json.loads(printed.getvalue())}


def tokens(rank):
    """Rows and cotangents of a rank, all of size one and different on each rank."""
    values = np.random.default_rng(rank).normal(size=(2, TOKENS, DIM)).astype(np.float32)
    return values[0], values[1]


def step(platform, layer, rows, cotangent):
    """Output, input gradient and parameter gradients of a layer."""
    handles = platform.parameters(layer)
    out, pullback = platform.vjp(layer, platform.from_host(rows), parameters=list(handles.values()))
    grad_rows, *grads = platform.to_host(*pullback(platform.from_host(cotangent)))
    return platform.to_host(out)[0], grad_rows, dict(zip(handles, grads, strict=True))


def sharded(platform):
    """A step of expert parallelism over all ranks."""
    import hyperep
    from hyperep.moe import MoE

    mesh = hyperep.init_device_mesh(platform, (RANKS,), ("ep",))
    layer = MoE(platform, DIM, HIDDEN, EXPERTS, TOP_K, seed=1)
    hyperep.ExpertParallel().apply(platform.named_modules(layer)["experts"], mesh)
    return step(platform, layer, *tokens(platform.rank))


def unsharded(platform):
    """The same step on one rank that has everybody's tokens."""
    from hyperep.moe import MoE

    rows, cotangents = (np.concatenate(parts) for parts in zip(*map(tokens, range(RANKS)), strict=True))
    return step(platform, MoE(platform, DIM, HIDDEN, EXPERTS, TOP_K, seed=1), rows, cotangents)


def errors():
    """Largest relative error of the output, the input gradient and each parameter's gradient."""
    from hyperep.loopback import run

    ((out, grad_rows, grads),) = run(unsharded, 1)
    parts = run(sharded, RANKS)
    own = {name: [part[2][name] for part in parts] for name in grads}
    joined = {name: sum(g) if "router" in name else np.concatenate(g) for name, g in own.items()}
    pairs = {
        "output": (np.concatenate([part[0] for part in parts]), out),
        "input gradient": (np.concatenate([part[1] for part in parts]), grad_rows),
        **{name: (joined[name], grads[name]) for name in grads},
    }
    return {name: float(np.abs(got - want).max() / np.abs(want).max()) for name, (got, want) in pairs.items()}


class Missing:
    """In the place of all finders: frameworks are not installed, and which of them were asked for is noted."""

    def __init__(self, finders):
        self.finders = list(finders)
        self.asked_for = []

    def find_spec(self, name, path=None, target=None):
        """Find no framework, which is what a probe and an import see where there is none."""
        if name.partition(".")[0] in FRAMEWORKS:
            self.asked_for.append(name)
            return None
        found = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in found if spec is not None), None)

    def find_distributions(self, *context):
        """What is installed, for entry points."""
        for finder in self.finders:
            yield from getattr(finder, "find_distributions", lambda *context: ())(*context)

    def invalidate_caches(self):
        """Pass it on."""
        for finder in self.finders:
            getattr(finder, "invalidate_caches", lambda: None)()


if __name__ == "__main__":
    missing = Missing(sys.meta_path)
    sys.meta_path[:] = [missing]
    report = {"states": states()}
    missing.asked_for.clear()  # the probes of the backends that are installed look for their frameworks
    report["errors"] = errors()
    report["asked_for"] = missing.asked_for
    print(json.dumps(report))
