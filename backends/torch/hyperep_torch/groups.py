# SPDX-License-Identifier: Apache-2.0
"""Group handles: PyTorch's process groups, and one for a rank that is alone without any."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

__all__ = ["SELF", "group_size"]


class _Self:
    """The group of a single rank where ``torch.distributed`` was never initialised."""

    def __repr__(self) -> str:
        return "SELF"


SELF = _Self()


def group_size(group: Any) -> int:
    """Number of ranks in *group*.

    Raises:
        ValueError: this rank is not a member. PyTorch's own collectives would only warn, and return without a result.
    """
    if group is SELF:
        return 1
    size = dist.get_world_size(group) if isinstance(group, dist.ProcessGroup) else -1
    if size < 1:
        raise ValueError(f"this rank is not a member of the group {group!r}; only members may use a group")
    return size
