# SPDX-License-Identifier: Apache-2.0
"""What the emulated device tells on stderr, for the tests of the platforms on it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

__all__ = ["heard", "told_buffers"]


def told_buffers(join: Callable[..., Any], small: Sequence[int], usual: Sequence[int]) -> list[list[str]]:
    """What the device says of the buffers of the group *small* with 50 MB, and of the group *usual* as HCCL has it.

    Args:
        join: makes this rank's platform, with options of its own. Called on every rank.
        small: ranks.
        usual: ranks.
    """
    said = []
    os.environ["EMULATED_NPU_TELL_BUFFERS"] = "1"
    try:
        for options, ranks in (({"hccl_buffer_mb": 50}, small), ({}, usual)):
            with heard() as lines:
                made = join(**options)
                group = made.new_group(ranks)
                if made.rank in ranks:
                    made.to_host(made.all_reduce(made.xp.ones((2,)), group))
            said.append([line for line in lines if "buffers" in line])
    finally:
        os.environ["EMULATED_NPU_TELL_BUFFERS"] = "0"
    return said


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """The lines that the process writes on its stderr meanwhile, from C too."""
    lines: list[str] = []
    with tempfile.TemporaryFile("w+") as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines.extend(file.read().splitlines())
