# SPDX-License-Identifier: Apache-2.0
"""Makes a world with an auxiliary process, prints every process id, and waits to be killed."""

import time

from programs import Plain, scheduler

from hyperep.launch.world import World

world = World(Plain((scheduler("import os, time; time.sleep(600)"),)), "plain", 2, deadline=30)
ranks = world.run("programs:process_id", {})
print(*ranks, *(auxiliary._popen.pid for auxiliary in world._auxiliaries), flush=True)
time.sleep(600)
