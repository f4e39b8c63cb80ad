"""The process as part of an MPI job: its launcher, its environment, and how it ends on an error."""

from __future__ import annotations

import os
import socket
import sys
import threading
import traceback
from types import TracebackType
from typing import NamedTuple

from zerompi.errors import ZerompiError


class _Launcher(NamedTuple):
    """How a launcher tells its processes how many they are."""

    name: str
    size_variable: str
    rank_variable: str


# PMIx tells a process its rank, but the number of ranks only through its own library.
_LAUNCHERS = (
    _Launcher("Open MPI's mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    _Launcher("MPICH's or Intel MPI's mpiexec (or srun --mpi=pmi2)", "PMI_SIZE", "PMI_RANK"),
    _Launcher("PALS' aprun or mpiexec", "PALS_SIZE", "PALS_RANKID"),
    _Launcher("MVAPICH's mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    _Launcher("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


def launched_size() -> tuple[int, str] | None:
    """How many processes the launcher started, by its environment variables, and its name."""
    for launcher in _LAUNCHERS:
        if launcher.rank_variable not in os.environ:
            continue
        value = os.environ.get(launcher.size_variable, "")
        if value.isdigit() and int(value) > 0:
            return int(value), launcher.name
    return None


def check_world(world_size: int) -> None:
    """Refuse a COMM_WORLD of one rank in a job of several.

    The launcher and the MPI library do not know each other then: every process believes to be alone,
    and all train the same model side by side.

    Raises:
        ZerompiError: in every process of the job.
    """
    started = launched_size()
    # A process that MPI starts for itself inherits the launcher's variables, but not a batch shell's.
    if world_size != 1 or started is None or started[0] == 1:
        return
    size, name = started
    raise ZerompiError(
        f"{name} started {size} processes, but this one's COMM_WORLD has 1 rank: the launcher and the MPI "
        "library that mpi4py uses do not fit together. Start the job with the mpiexec of that library "
        "(`python -m mpi4py --mpi-lib-version` names it), or choose the matching plugin of srun "
        "(--mpi=pmi2 for MPICH and Intel MPI, --mpi=pmix for Open MPI)"
    )


def local_ranks() -> int:
    """How many ranks of the job run on this node, as far as the launcher tells; else 1."""
    for variable in (
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "MPI_LOCALNRANKS",
        "PALS_LOCAL_SIZE",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ):
        value = os.environ.get(variable, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0].split(",")[0]
    return int(tasks) if tasks.isdigit() else 1


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_rank(local_size: int) -> int:
    """Threads that each of `local_size` ranks of a node should compute with.

    OMP_NUM_THREADS if it is set; else the cores that are there divided by the ranks, for a launcher that
    binds each rank to cores of its own shows each rank only these.
    """
    value = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if value.isdigit() and int(value) > 0:
        return int(value)
    bound = num_cores() < (os.cpu_count() or 1)
    return max(1, num_cores() if bound else num_cores() // local_size)


def prepare_environment() -> None:
    """Let waiting ranks yield their core where there are more ranks than cores.

    MPI libraries poll while they wait; with more ranks than cores that takes the core from the rank they
    wait for. Must run before MPI is initialised; what the user has set stays.
    """
    if local_ranks() > num_cores():
        os.environ.setdefault("MPIR_CVAR_ENABLE_HEAVY_YIELD", "1")
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")


# -- errors ------------------------------------------------------------------------------------


def abort_on_exception() -> None:
    """End the whole job when an exception ends this process, or one of its threads.

    Without it the other ranks would wait for this one for ever. The traceback is printed first, each line
    marked with the rank. Does nothing in a job of one rank.
    """
    if getattr(sys.excepthook, "zerompi", False):
        return
    sys.excepthook = _Excepthook(sys.excepthook)
    threading.excepthook = _thread_excepthook


class _Excepthook:
    zerompi = True

    def __init__(self, before: object) -> None:
        self.before = before

    def __call__(
        self,
        kind: type[BaseException],
        value: BaseException,
        trace: TracebackType | None,
    ) -> None:
        if _is_alone():
            sys.__excepthook__(kind, value, trace)
            return
        report_and_abort(kind, value, trace)


def _thread_excepthook(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is SystemExit:
        return
    if _is_alone() or args.exc_value is None:
        threading.__excepthook__(args)
        return
    report_and_abort(args.exc_type, args.exc_value, args.exc_traceback)


def _is_alone() -> bool:
    from mpi4py import MPI

    return not MPI.Is_initialized() or MPI.Is_finalized() or MPI.COMM_WORLD.size == 1


def report_and_abort(
    kind: type[BaseException], value: BaseException, trace: TracebackType | None
) -> None:
    """Print the traceback with this rank's mark, then end all ranks of COMM_WORLD with status 1."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    mark = f"[rank {world.rank} of {world.size} on {socket.gethostname()}]"
    lines = "".join(traceback.format_exception(kind, value, trace)).splitlines()
    sys.stdout.flush()
    sys.stderr.write("".join(f"{mark} {line}\n" for line in lines))
    sys.stderr.flush()
    world.Abort(1)
