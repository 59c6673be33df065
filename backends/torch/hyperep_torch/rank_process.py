# SPDX-License-Identifier: Apache-2.0
"""What a launched rank does: run its part of the program, and leave a trace of how it ended."""

from __future__ import annotations

import faulthandler
import os
import pkgutil
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperep.launch import Launcher, RankProcess
from hyperep.launch.lifeline import die_with_parent
from hyperep_torch.host_memory import keep_memory

__all__ = ["FAILURE", "STACK", "run_rank"]

FAILURE = "failure"
"""``failure.RANK`` holds the time in ns on a line of its own, then the traceback of what that rank raised."""
STACK = "stack"
"""``stack.RANK`` holds where that rank stood when it was ended; empty if it died without being asked to."""


def run_rank(
    launcher: Launcher,
    platform_name: str,
    program: str,
    arguments: Mapping[str, Any],
    reports: str,
    parent: int,
    ends_at: float | None,
) -> Any:
    """Run *program* as the rank that the environment says; return its value on rank 0 and nothing elsewhere."""
    rank = int(os.environ["RANK"])
    die_with_parent(parent)
    # All ranks of this launch are here, so gloo needs no other interface than the local one.
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    keep_memory()
    with open(Path(reports) / f"{STACK}.{rank}", "w") as stack:
        # These write from C, also while the rank waits inside a collective.
        faulthandler.register(signal.SIGTERM, stack, all_threads=True, chain=True)
        if ends_at is not None:
            faulthandler.dump_traceback_later(max(0.1, ends_at - time.time()), exit=True, file=stack)
        try:
            function = pkgutil.resolve_name(program)
            process = RankProcess(ranks=(rank,))
            (value,) = launcher.host(process, lambda platform: function(platform, **arguments), platform_name)
        except BaseException:
            (Path(reports) / f"{FAILURE}.{rank}").write_text(f"{time.time_ns()}\n{traceback.format_exc()}")
            sys.stdout.flush()
            # Not through the interpreter's end: leaving the process group could wait for the other ranks.
            os._exit(1)
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGTERM)
        stack.write("the end of the program")
    return value if rank == 0 else None
