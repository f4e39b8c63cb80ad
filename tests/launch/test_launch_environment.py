"""What the launcher's environment says, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from harness.mpirun import ROOT, clean_environment
from zerompi import ZerompiError, launch

LAUNCHERS = {
    "Open MPI": {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"},
    "MPICH": {"PMI_SIZE": "4", "PMI_RANK": "1"},
    "srun": {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"},
}
MPIEXEC_UNDER_SLURM = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
BATCH_SHELL = {
    "SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip
VARIABLES = [
    *{name for variables in LAUNCHERS.values() for name in variables},
    "PALS_SIZE", "PALS_RANKID", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MPI_LOCALNRANKS",
    "OMPI_COMM_WORLD_LOCAL_SIZE", "PALS_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE",
    "SLURM_STEP_TASKS_PER_NODE", "OMP_NUM_THREADS", "MPIR_CVAR_ENABLE_HEAVY_YIELD",
]  # fmt: skip


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def launched(monkeypatch):
    def set_variables(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize("name", LAUNCHERS)
def test_world_of_one_rank_in_a_job_of_several_is_refused(launched, name):
    launched(LAUNCHERS[name])
    with pytest.raises(ZerompiError, match=r"started 4 processes.*COMM_WORLD has 1 rank"):
        launch.check_world(1)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_world_of_several_ranks_is_accepted(launched, name):
    launched(LAUNCHERS[name])
    launch.check_world(4)


def test_single_process_in_a_batch_shell_is_accepted(launched):
    launched(BATCH_SHELL)
    launch.check_world(1)


def test_single_rank_under_mpiexec_in_a_slurm_job_of_several_nodes_is_accepted(launched):
    launched({**MPIEXEC_UNDER_SLURM, "PMI_SIZE": "1", "PMI_RANK": "0"})
    launch.check_world(1)


def test_process_without_a_launcher_is_accepted():
    assert launch.launched_size() is None
    launch.check_world(1)


@pytest.mark.parametrize("name", ["Open MPI", "srun"])
def test_partition_refuses_a_launcher_that_does_not_fit(run_mpi, name):
    program = "import torch, zerompi; zerompi.partition(torch.nn.Linear(2, 2))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**clean_environment(), **LAUNCHERS[name]},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "started 4 processes, but this one's COMM_WORLD has 1 rank" in done.stderr


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, 1),
        ({"MPI_LOCALNRANKS": "3"}, 3),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),1"}, 4),
    ],
)
def test_ranks_of_the_node_are_read_from_the_launcher(launched, variables, expected):
    launched(variables)
    assert launch.local_ranks() == expected


def test_threads_share_the_cores_of_the_node(monkeypatch):
    monkeypatch.setattr(launch, "_cores", lambda pid: set(range(8)))
    assert [launch.threads_per_rank(n) for n in (1, 3, 4, 16)] == [8, 2, 2, 1]


def test_threads_of_a_bound_rank_fill_its_own_cores(monkeypatch):
    monkeypatch.setattr(launch, "_cores", lambda pid: set(range(8 if pid else 2)))
    assert launch.threads_per_rank(4) == 2


def test_threads_follow_omp_num_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert launch.threads_per_rank(4) == 3


@pytest.mark.parametrize(
    ("ranks", "own_cores", "expected"), [("4", 2, "1"), ("2", 2, None), ("4", 1, None)]
)
def test_waiting_ranks_yield_only_where_they_share_cores(
    monkeypatch, launched, ranks, own_cores, expected
):
    launched({"MPI_LOCALNRANKS": ranks})
    monkeypatch.setattr(launch, "_cores", lambda pid: set(range(2 if pid else own_cores)))
    launch.prepare_environment()
    value = os.environ.get("MPIR_CVAR_ENABLE_HEAVY_YIELD")
    monkeypatch.delenv("MPIR_CVAR_ENABLE_HEAVY_YIELD", raising=False)
    assert value == expected


def test_users_own_choice_of_waiting_stays(monkeypatch, launched):
    launched({"MPI_LOCALNRANKS": "4", "MPIR_CVAR_ENABLE_HEAVY_YIELD": "0"})
    monkeypatch.setattr(launch, "_cores", lambda pid: {0})
    launch.prepare_environment()
    assert os.environ["MPIR_CVAR_ENABLE_HEAVY_YIELD"] == "0"
