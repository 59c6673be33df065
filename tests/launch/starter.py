# SPDX-License-Identifier: Apache-2.0
"""Runs a rank that prints its process id and stays, and says how that ended."""

from programs import Plain

from hyperep.launch import run_on_ranks
from hyperep.launch.interruption import Interrupted

try:
    run_on_ranks(Plain(), "plain", "programs:tell_and_stay", {}, 1)
except Interrupted as end:
    print(f"{end}, {end.status}", flush=True)
