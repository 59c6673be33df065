# SPDX-License-Identifier: Apache-2.0
"""What ``import hyperep`` costs, beside ``import numpy``: medians over fresh interpreters, start-up taken off.

Run it from anywhere: ``python benchmarks/import_time.py``. The aim is at most twice NumPy's own import.
"""

import statistics
import subprocess
import sys
import time

REPEATS = 15
STATEMENTS = {
    "nothing": "pass",
    "import numpy": "import numpy",
    "import hyperep": "import hyperep",
    "hyperep.ExpertParallel": "import hyperep; hyperep.ExpertParallel",
    "hyperep.get_platform": "import hyperep; hyperep.get_platform",
}


def seconds(statement: str) -> float:
    """Wall time of a new interpreter that runs one statement."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - begin


def main() -> None:
    """Take turns between the statements, so that a slow moment of the machine meets all of them."""
    rounds = [{name: seconds(statement) for name, statement in STATEMENTS.items()} for _ in range(REPEATS + 1)][1:]
    median = {name: statistics.median(times[name] for times in rounds) for name in STATEMENTS}
    numpy = median["import numpy"] - median["nothing"]
    for name in list(STATEMENTS)[1:]:
        cost = median[name] - median["nothing"]
        print(f"{name:24} {cost * 1e3:7.1f} ms   {cost / numpy:5.2f} times numpy")


if __name__ == "__main__":
    main()
