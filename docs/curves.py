# SPDX-License-Identifier: Apache-2.0
"""Draw the loss curves of several runs on one chart: ``python docs/curves.py OUT.png NAME=RUN_DIR ...``.

A run's directory is what ``hyperep train --out`` has written. Prints how far each run is from the first one.
"""

import json
import sys
from pathlib import Path


def losses(directory: str) -> list[float]:
    """The loss of every step."""
    lines = (Path(directory) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def main(out: str, *runs: str) -> None:
    """Draw *runs*, given as ``NAME=DIRECTORY``, into the file *out*."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    curves = {name: losses(directory) for name, directory in (run.split("=", 1) for run in runs)}
    first = next(iter(curves.values()))
    for i, (name, curve) in enumerate(curves.items()):
        deviation = max(abs(a - b) / b for a, b in zip(curve, first, strict=True))
        print(f"{name}: largest relative deviation {deviation:.1e}")
        # The curves coincide: each one is drawn narrower than the one below it.
        width = 2.0 + 3.0 * (len(curves) - 1 - i)
        axes.plot(range(1, len(curve) + 1), curve, linewidth=width, label=name)
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="The same seed on every platform, two ranks")
    axes.legend()
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
