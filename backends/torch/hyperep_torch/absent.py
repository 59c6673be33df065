# SPDX-License-Identifier: Apache-2.0
"""Who did not come to a collective that has timed out.

PyTorch says that it waited for so long, and not for whom. Each rank that gives up writes that into the store that the
ranks have met by, and looks who else has; the others were somewhere else. On devices whose collectives a stream waits
for (NCCL) no error comes here, and PyTorch's own watchdog ends the process.
"""

from __future__ import annotations

import time

import torch.distributed as dist

__all__ = ["name_absent"]

_PATIENCE = 2.0
"""Seconds for the others to give up as well: they have begun to wait a little later."""
_LOOK = 0.1
_TIMEOUTS = ("timed out", "timeout")


def name_absent(error: RuntimeError, group: dist.ProcessGroup) -> None:
    """Add to *error*, that of a collective of *group*, which of its ranks did not come, if it is one of time."""
    ranks = dist.get_process_group_ranks(group)
    number = group._get_sequence_number_for_group()
    try:
        waited = dist.PrefixStore(f"hyperep/waited/{group.group_name}/{number}", _store())
        # Also where the error is another one: gloo closes the connections of a rank that gives up.
        waited.set(str(dist.get_rank()), "")
        if not any(words in str(error).lower() for words in _TIMEOUTS):
            return
        absent = _absent(waited, ranks)
    except RuntimeError:  # PyTorch's errors of its stores are all of this kind; who held it has gone
        return
    told = f"collective number {number} of the group of ranks {ranks}"
    if absent:
        error.add_note(
            f"hyperep: {told} timed out, and rank{'s' * (len(absent) > 1)} {', '.join(map(str, absent))} did not wait "
            "in it. Every rank must call each sharded layer equally often, forward and backward, also without tokens "
            "of its own; look where these ranks were"
        )
    else:
        error.add_note(f"hyperep: {told} timed out though all of them wait in it; look at the network between them")


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def _absent(waited: dist.Store, ranks: list[int]) -> list[int]:
    end = time.monotonic() + _PATIENCE
    while True:
        absent = [rank for rank in ranks if not waited.check([str(rank)])]
        if not absent or time.monotonic() > end:
            return absent
        time.sleep(_LOOK)
