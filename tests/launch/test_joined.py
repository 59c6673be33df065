# SPDX-License-Identifier: Apache-2.0
"""A rank of somebody else's launch watches its own steps."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys, time
from hyperep.launch import step_done
from hyperep.launch.joined import watched_steps

def stuck_in_code():
    while True:
        time.sleep(0.1)

with watched_steps(3, 2.0):
    for _ in range(8):
        time.sleep(0.5)  # longer, all together, than one step may take
        step_done()
    if sys.argv[1] == "stuck":
        stuck_in_code()
print("done")
"""


def run(argument):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, argument],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_a_rank_that_does_no_step_says_where_it_stands_and_ends():
    end = run("stuck")
    assert end.returncode == 1
    assert end.stderr.startswith(
        "hyperep: error: rank 3 did no step for 2 s (--timeout or HYPEREP_TIMEOUT sets how long one may take) after "
        "step 8; it stands in stuck_in_code (<string>:"
    )
    assert end.stderr.count("\n") == 1


@pytest.mark.parametrize("argument", ["done"])
def test_a_rank_that_is_slow_but_goes_on_is_left_alone(argument):
    end = run(argument)
    assert (end.returncode, end.stdout, end.stderr) == (0, "done\n", "")
