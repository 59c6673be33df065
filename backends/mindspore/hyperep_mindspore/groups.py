# SPDX-License-Identifier: Apache-2.0
"""Process groups. MindSpore names them by strings and lets only members create one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mindspore import communication

from hyperep_mindspore.private_names import group_options
from hyperep_mindspore.world import SELF, World

__all__ = ["Group", "new_group", "world_group"]


@dataclass(frozen=True)
class Group:
    """Ranks that communicate, as one of them sees it."""

    name: str
    """MindSpore's name; ``SELF`` for a group of one."""
    ranks: tuple[int, ...]
    """World ranks, by rank in the group."""
    rank: int
    """This process's rank in the group; -1 outside it."""

    @property
    def size(self) -> int:
        """Number of ranks.

        Raises:
            ValueError: this process is not one of them.
        """
        if self.rank < 0:
            raise ValueError(
                f"this rank is not a member of the group of ranks {list(self.ranks)}; only members may use it"
            )
        return len(self.ranks)


def world_group(world: World) -> Group:
    """The group of all ranks."""
    return Group(world.group, tuple(range(world.size)), world.rank)


def new_group(world: World, ranks: Sequence[int], hccl_buffer_mb: int | None = None) -> Group:
    """Make a group; what non-members get must not be used.

    Args:
        world: of which the group is a part.
        ranks: its members.
        hccl_buffer_mb: on Ascend, the size of its buffers in MB; ``None`` leaves it to HCCL.

    Raises:
        ValueError: the ranks are not ascending ranks of the world.
    """
    members = tuple(int(rank) for rank in ranks)
    if not members or list(members) != sorted(set(members)) or members[0] < 0 or members[-1] >= world.size:
        raise ValueError(
            f"new_group({list(members)}): give one or more ranks below {world.size}, each once and ascending, which is "
            "how MindSpore numbers the ranks of a group"
        )
    if world.rank not in members:
        return Group("", members, -1)
    if len(members) == 1:
        return Group(SELF, members, 0)
    if len(members) == world.size:
        return world_group(world)
    # The same ranks are the same group: its members are in step anyway, and MindSpore refuses a name twice.
    name = "hyperep_" + "_".join(map(str, members))
    if name not in _created:
        communication.create_group(name, list(members), _options(hccl_buffer_mb))
        _created.add(name)
    return Group(name, members, members.index(world.rank))


def _options(hccl_buffer_mb: int | None) -> Any:
    if hccl_buffer_mb is None:
        return None
    options = group_options()
    options.hccl_config = {"hccl_buffer_size": hccl_buffer_mb}
    return options


_created: set[str] = set()
"""Names of the groups that MindSpore knows in this process."""
