# SPDX-License-Identifier: Apache-2.0
"""A layer over machines with slow links: rows, tokens, and tokens in two levels, on the same data and in turns.

    python benchmarks/slow_link.py --shape fine --rate 400mbit

makes two machines of two ranks out of network namespaces (``nodes.py``: root, iproute2), runs the routed layer of a
preset of ``hyperep bench`` forward and backward, checks that all three agree, and prints a line of JSON: milliseconds,
how many times faster than the exchange of rows, and the bytes that crossed from one machine to the other, beside what
theory says must cross in two levels: each token once to each other machine that owns one of its experts, there and
back, and so its gradient, and the numbers and weights of its choices with it.

    python benchmarks/slow_link.py --shape fine --rate 1gbit --ranks 1 --chunks 4 --timeline wire.svg

adds both with the first exchange in chunks, and how long the wire and the arithmetic take, each alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from hyperep.bench import theory
from hyperep.bench.apart import Apart
from hyperep.bench.counting import CountingPlatform
from hyperep.bench.data import Data
from hyperep.bench.layer import Layer
from hyperep.bench.program import follow
from hyperep.bench.shapes import Shape, preset
from hyperep.bench.timeline_picture import draw_timeline
from hyperep.bench.timing import interleaved, wait
from hyperep.bench.way import Way
from hyperep.exchange import token_input
from hyperep.mesh import init_device_mesh
from hyperep.styles import ExpertParallel

TOLERANCE = 1e-4


def layers(platform: Any, shape: Shape, node_count: int, chunks: int) -> dict[str, Layer]:
    """The layer in three ways, and in chunks if that is wanted."""
    ranks = platform.world_size
    flat = init_device_mesh(platform, (ranks,), ("ep",))
    grid = init_device_mesh(platform, (node_count, ranks // node_count), ("node", "ep"))
    data = Data(platform, shape, platform.rank)
    ways = {
        "rows": Layer(data, flat, ExpertParallel(exchange="rows")),
        "tokens": Layer(data, flat, ExpertParallel()),
        "levels": Layer(data, grid, ExpertParallel(levels=("node", "ep"))),
    }
    if chunks > 1:
        ways["chunks"] = Layer(data, flat, ExpertParallel(chunks=chunks))
        ways["levels in chunks"] = Layer(data, grid, ExpertParallel(levels=("node", "ep"), chunks=chunks))
    return ways


def check(platform: Any, ways: dict[str, Layer]) -> None:
    """All ways give what the exchange of rows gives.

    Raises:
        ArithmeticError: one does not.
    """
    wanted = [x.astype(np.float64) for x in platform.to_host(*ways["rows"].forward_backward())]
    for name, layer in ways.items():
        for number, (got, want) in enumerate(zip(platform.to_host(*layer.forward_backward()), wanted, strict=True)):
            error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)
            if not error < TOLERANCE:
                raise ArithmeticError(f"{name} differs from rows in gradient {number} by {error:.1e}")


def crossed(platform: Any, shape: Shape, node_count: int, chunks: int) -> dict[str, int]:
    """Bytes that went from one machine to another in forward and backward, by way, all ranks together."""
    counting: Any = CountingPlatform(platform)
    own = platform.rank * node_count // platform.world_size
    found = []
    ways = layers(counting, shape, node_count, chunks)
    for layer in ways.values():
        counting.take()
        wait(platform, layer.forward_backward())
        sent = counting.take().sent
        found.append(sum(size for rank, size in sent.items() if rank * node_count // platform.world_size != own))
    total = platform.to_host(platform.all_reduce(platform.from_host(np.array(found, dtype=np.int64))))[0]
    return dict(zip(ways, total.tolist(), strict=True))


def theory_of_levels(shape: Shape, ranks: int, node_count: int, token_bytes: int) -> int:
    """What must cross between machines in two levels."""
    copies = shape.copies(ranks, owners=node_count)  # [R, nodes]
    between = copies.reshape(node_count, ranks // node_count, node_count).sum(axis=1)
    headers = node_count * (node_count - 1) * token_input.HEADER * 8
    tokens = theory.token_wire_bytes(between, shape.top_k, token_bytes) - headers
    return tokens + ranks // node_count * headers  # the ranks of a node each have a line of their own


def measure(platform: Any, shape: Shape, node_count: int, repetitions: int, chunks: int) -> dict[str, Any]:
    """What is printed."""
    ways = layers(platform, shape, node_count, chunks)
    check(platform, ways)
    contestants = {name: layer.forward_backward for name, layer in ways.items()}
    if chunks > 1:
        apart = Apart(init_device_mesh(platform, (platform.world_size,), ("ep",)), shape, ExpertParallel())
        contestants |= {"wire": apart.wire, "arithmetic": apart.arithmetic}
    times = interleaved(platform, contestants, repetitions)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    over_links = crossed(platform, shape, node_count, chunks)
    token_bytes = ways["rows"].data.token_bytes
    return {
        "shape": shape.name,
        "nodes": node_count,
        "ranks": platform.world_size,
        "ms": medians,
        "chunks": chunks,
        "times_faster_than_rows": {name: medians["rows"] / medians[name] for name in ways},
        "bytes_between_nodes": over_links,
        "times_fewer_bytes_than_rows": {name: over_links["rows"] / size for name, size in over_links.items()},
        "bytes_between_nodes_theory": theory_of_levels(shape, platform.world_size, node_count, token_bytes),
    }


def on_rank(arguments: argparse.Namespace) -> None:
    """What each rank does; rank 0 prints."""
    import torch
    import torch.distributed as dist
    from hyperep_torch.host_memory import keep_memory
    from hyperep_torch.platform import join

    keep_memory()  # as ranks that hyperep starts do
    torch.set_num_threads(1)
    # The machines share their disk, and have no server for names, which a store on a socket would ask for minutes.
    where = {"rank": int(os.environ["RANK"]), "world_size": arguments.nodes * arguments.ranks}
    dist.init_process_group("gloo", init_method=f"file://{os.environ['HYPEREP_STORE']}", **where)
    platform = join(device="cpu")
    shape = preset(arguments.shape)
    if arguments.tokens:
        shape = dataclasses.replace(shape, tokens=arguments.tokens)
    found = measure(platform, shape, arguments.nodes, arguments.repetitions, arguments.chunks)
    if arguments.timeline:
        followed = follow(platform, shape, Way(chunks=arguments.chunks, timeline=True))
        if platform.rank == 0:
            draw_timeline([{"shape": f"{shape.name} over {arguments.rate}", **followed}], Path(arguments.timeline))
    if platform.rank == 0:
        print(json.dumps({"rate": arguments.rate, **found}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def start(arguments: argparse.Namespace) -> int:
    """Make the machines, start a rank for each place, and end all of them with the first that fails."""
    sys.path.insert(0, str(Path(__file__).parent))
    from nodes import nodes, reason_against

    reason = reason_against()
    if reason:
        print(f"slow_link: no machines can be made here: {reason}", file=sys.stderr)
        return 2
    world = arguments.nodes * arguments.ranks
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the machines are taken down
    with tempfile.TemporaryDirectory() as store, nodes(arguments.nodes, arguments.rate) as machines:
        processes = []
        for rank in range(world):
            machine = machines[rank // arguments.ranks]
            environment = {
                "RANK": str(rank),
                "HYPEREP_STORE": str(Path(store) / "store"),
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            }
            processes.append(machine.popen([sys.executable, __file__, "--rank", *sys.argv[1:]], environment))
        try:
            return _watch(processes, time.monotonic() + arguments.deadline)
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _watch(processes: list[subprocess.Popen[str]], end: float) -> int:
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.poll()]
        if failed or time.monotonic() > end:
            print(f"slow_link: rank {failed[0]} failed" if failed else "slow_link: out of time", file=sys.stderr)
            return 1
        time.sleep(0.1)
    assert processes[0].stdout is not None
    sys.stdout.write(processes[0].stdout.read())
    return max(process.returncode for process in processes)


def main() -> None:
    """Start machines, or be a rank on one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="fine", help="a preset of hyperep bench")
    parser.add_argument("--tokens", type=int, help="tokens of a rank, where they are not those of the preset")
    parser.add_argument("--nodes", type=int, default=2, help="machines")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of each")
    parser.add_argument("--rate", default="400mbit", help="of each machine's link, as tc writes it")
    parser.add_argument("--chunks", type=int, default=1, help="parts in which tokens travel, for the ways in chunks")
    parser.add_argument("--timeline", help="draw what is on the wire, and when ranks compute, in chunks and without")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--deadline", type=float, default=600.0, help="seconds")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        on_rank(arguments)
    else:
        sys.exit(start(arguments))


if __name__ == "__main__":
    main()
