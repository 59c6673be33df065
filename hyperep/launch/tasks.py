# SPDX-License-Identifier: Apache-2.0
"""Launches of cluster schedulers and MPI, by the variables that they leave in the environment of each task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Task", "integer", "refuse_tasks", "task_of"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """This process as one of several that somebody started."""

    launcher: str
    """The command that is known for it."""
    rank: int
    size: int
    local_rank: int | None
    """Its number on this machine, if that is told."""
    told_by: str
    """The variables, with their values."""


@dataclass(frozen=True, kw_only=True)
class _Family:
    launcher: str
    rank: str
    sizes: tuple[str, ...]
    local_rank: str


_FAMILIES = (
    _Family(
        launcher="srun",
        rank="SLURM_PROCID",
        # Of the step that srun started; the other one is that of the whole allocation.
        sizes=("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"),
        local_rank="SLURM_LOCALID",
    ),
    _Family(
        launcher="mpirun",
        rank="OMPI_COMM_WORLD_RANK",
        sizes=("OMPI_COMM_WORLD_SIZE",),
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    _Family(launcher="mpiexec", rank="PMI_RANK", sizes=("PMI_SIZE",), local_rank="MPI_LOCALRANKID"),
)


def task_of(environment: Mapping[str, str]) -> Task | None:
    """The task that *environment* describes: of Slurm, of Open MPI, or of PMI, which MPICH and others speak.

    ``None`` where there is one task only, and in a batch script, which Slurm numbers like the first of its tasks
    though it has not started any yet.

    Raises:
        ValueError: a variable is no number, or a rank is beyond the size.
    """
    for family in _FAMILIES:
        size_name = next((name for name in family.sizes if name in environment), None)
        if family.rank not in environment or size_name is None:
            continue
        if environment.get("ENVIRONMENT") == "BATCH" and size_name != family.sizes[0]:
            continue
        size = integer(environment, size_name, at_least=1)
        rank = integer(environment, family.rank, below=size, below_name=size_name)
        if size == 1:
            continue
        local = integer(environment, family.local_rank) if family.local_rank in environment else None
        told = ", ".join(f"{name}={environment[name]}" for name in (family.rank, size_name))
        return Task(launcher=family.launcher, rank=rank, size=size, local_rank=local, told_by=told)
    return None


def refuse_tasks(environment: Mapping[str, str], who: str, instead: str) -> None:
    """Say that there is a launch, and that it is not joined, where *environment* describes one.

    Without this each task would be a world of its own, and all of them would do the same thing in the same place.

    Args:
        environment: of this process.
        who: does not join it, such as ``"platform 'loopback'"``.
        instead: what to do.

    Raises:
        ValueError: this process is one of several tasks.
    """
    task = task_of(environment)
    if task is not None:
        raise ValueError(
            f"this process is task {task.rank} of {task.size} that {task.launcher} started ({task.told_by}), and {who} "
            f"does not join that launch: {instead}, or unset {task.told_by.partition('=')[0]} to be alone on purpose"
        )


def integer(
    environment: Mapping[str, str], name: str, *, at_least: int = 0, below: int | None = None, below_name: str = ""
) -> int:
    """The whole number that the variable *name* holds.

    Raises:
        ValueError: it holds something else, or a number out of range; the message names the variable.
    """
    text = environment[name]
    try:
        number = int(text)
    except ValueError:
        raise ValueError(f"the environment has {name}={text!r}, which is not a whole number; set it right") from None
    if number < at_least:
        raise ValueError(f"the environment has {name}={text}, which must be at least {at_least}; set it right")
    if below is not None and number >= below:
        raise ValueError(
            f"the environment has {name}={text} and {below_name}={below}, but ranks go from 0 to {below - 1}; set one "
            "of them right"
        )
    return number
