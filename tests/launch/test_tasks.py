# SPDX-License-Identifier: Apache-2.0
"""Launches of schedulers and of MPI: which task of how many this process is, by its environment."""

import pytest

from hyperep.launch.tasks import refuse_tasks, task_of

SLURM = {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}
ALL = pytest.mark.parametrize("environment", [SLURM, OPEN_MPI, PMI], ids=["slurm", "open mpi", "pmi"])


@ALL
def test_a_task_knows_its_place(environment):
    task = task_of(environment)
    assert (task.rank, task.size, task.local_rank) == (1, 2, 0)


@ALL
def test_what_is_not_joined_is_said_with_the_way_out(environment):
    with pytest.raises(ValueError, match=r"task 1 of 2 that .* started") as caught:
        refuse_tasks(environment, "platform 'loopback'", "start one task")
    assert "platform 'loopback' does not join that launch: start one task, or unset " in str(caught.value)
    assert next(iter(environment)) in str(caught.value)


@ALL
def test_words_and_numbers_out_of_range_are_named(environment):
    rank, *_ = environment
    size = next(name for name in environment if name.endswith(("NUM_TASKS", "SIZE")))
    for changed, message in (
        ({rank: "one"}, f"{rank}='one', which is not a whole number"),
        ({size: "two"}, f"{size}='two', which is not a whole number"),
        ({rank: "2"}, f"{rank}=2 and {size}=2, but ranks go from 0 to 1"),
        ({rank: "-1"}, f"{rank}=-1, which must be at least 0"),
        ({size: "0"}, f"{size}=0, which must be at least 1"),
    ):
        with pytest.raises(ValueError, match="the environment has") as caught:
            task_of({**environment, **changed})
        assert message in str(caught.value)


def test_one_task_is_no_launch():
    assert task_of({}) is None
    assert task_of({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}) is None
    assert task_of({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}) is None


def test_a_batch_script_is_no_task_but_what_it_starts_is():
    batch = {"ENVIRONMENT": "BATCH", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}
    assert task_of(batch) is None
    assert task_of({**batch, "SLURM_STEP_NUM_TASKS": "4"}).size == 4
