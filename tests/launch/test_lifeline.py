# SPDX-License-Identifier: Apache-2.0
"""A process that was started by another one does not outlive it, also where that one went first."""

import subprocess
import sys

import pytest

ORPHAN = """
import os, sys, time
from hyperep.launch.lifeline import become, die_with_parent
parent = int(sys.argv[1])
while os.getppid() == parent:  # the kernel cannot tell of a death that is over before it was asked to
    time.sleep(0.01)
{end_of_life}
print("lives on", flush=True)
"""


@pytest.mark.parametrize("end_of_life", ["die_with_parent(parent)", "become(parent, ['echo', 'lives on'])"])
def test_a_process_whose_parent_is_gone_already_ends(end_of_life):
    orphan = ORPHAN.format(end_of_life=end_of_life)
    # The shell ends at once; its output, which the orphan shares, ends with the orphan.
    command = ["sh", "-c", '"$0" -c "$1" $$ &', sys.executable, orphan]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_process_whose_parent_lives_goes_on():
    code = "import os; from hyperep.launch.lifeline import become; become(os.getppid(), ['echo', 'lives on'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "lives on\n", done.stderr
