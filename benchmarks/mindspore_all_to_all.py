# SPDX-License-Identifier: Apache-2.0
"""All-to-all on MindSpore's CPU: messages between pairs, as the platform has it, against an all-gather of padded rows.

Run it with: python benchmarks/mindspore_all_to_all.py
"""

import statistics
import time

import numpy as np

SIZES = [(8, 16), (512, 64), (2048, 512), (8192, 512)]
"""Rows sent by a rank, on average, and numbers in a row."""
REPETITIONS = 9


def measure(platform, rows, dim):
    """Median milliseconds of both ways, for uneven random splits."""
    ranks, me = platform.world_size, platform.rank
    splits = np.random.default_rng(rows).integers(0, 2 * rows // ranks + 1, (ranks, ranks))  # [from, to]
    x = np.random.default_rng(me).normal(size=(int(splits[me].sum()), dim)).astype(np.float32)
    x = platform.from_host(x)
    most = int(splits.sum(1).max())

    def pairs():
        return platform.all_to_all_single(x, splits[:, me].tolist(), splits[me].tolist())

    def padded():
        # The other ranks' splits are not known beforehand: they are exchanged too.
        platform.to_host(platform.all_gather(platform.from_host(splits[me])))
        filled = platform.xp.concat([x, platform.xp.zeros((most - x.shape[0], dim))], axis=0)
        every = platform.all_gather(filled)  # [R * most, dim]
        starts = [r * most + int(splits[r, :me].sum()) for r in range(ranks)]
        return platform.xp.concat([every[a : a + int(n)] for a, n in zip(starts, splits[:, me], strict=True)], axis=0)

    times = {}
    for name, exchange in (("pairs", pairs), ("padded", padded)):
        taken = []
        for _ in range(REPETITIONS):
            platform.barrier()
            began = time.perf_counter()
            (result,) = platform.to_host(exchange())
            taken.append(1e3 * (time.perf_counter() - began))
        times[name] = (statistics.median(taken[1:]), result)
    np.testing.assert_array_equal(times["pairs"][1], times["padded"][1])
    return {name: median for name, (median, _) in times.items()}


def main():
    """Print a line per size for two and four ranks."""
    from hyperep_mindspore.launcher import launcher

    from hyperep.launch.pool import RankPool

    print("ranks   MB a rank   pairs ms   padded ms   ratio")
    for ranks in (2, 4):
        with RankPool(launcher, "mindspore", ranks, start_deadline=300.0) as pool:
            for rows, dim in SIZES:
                name = "mindspore_all_to_all:measure"
                took = pool.run(name, {"rows": rows, "dim": dim}, deadline=300.0)[0]
                ratio = took["padded"] / took["pairs"]
                print(f"{ranks:5} {4e-6 * rows * dim:11.3f} {took['pairs']:10.1f} {took['padded']:11.1f} {ratio:7.1f}")


if __name__ == "__main__":
    main()
