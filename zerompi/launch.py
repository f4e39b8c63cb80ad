"""The process as part of an MPI job: its launcher, its environment, and how it ends on an error."""

from __future__ import annotations

import errno
import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import NamedTuple, NoReturn, TextIO, TypeVar

from zerompi.errors import ZerompiError


class _Launcher(NamedTuple):
    """How a launcher tells its processes how many they are."""

    name: str
    size_variable: str
    rank_variable: str


# In this order: the daemons of mpiexec are themselves started by srun in a Slurm job, and hand its
# variables down. srun's stand in every step, but not in the shell of sbatch or salloc.
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

    The launcher and the MPI library do not know each other then: every process believes to be
    alone, and all train the same model side by side.

    Raises:
        ZerompiError: in every process of the job.
    """
    started = launched_size()
    if world_size != 1 or started is None or started[0] == 1:
        return
    size, name = started
    raise ZerompiError(
        f"{name} started {size} processes, but this one's COMM_WORLD has 1 rank: the launcher and "
        "the MPI library that mpi4py uses do not fit together. Start the job with the mpiexec of "
        "that library (`python -m mpi4py --mpi-lib-version` names it), or choose the matching "
        "plugin of srun (--mpi=pmi2 for MPICH and Intel MPI, --mpi=pmix for Open MPI)"
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


def local_rank() -> int | None:
    """This rank's number among those of its node, as far as the launcher tells."""
    for variable in (
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "MPI_LOCALRANKID",
        "PALS_LOCAL_RANKID",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "SLURM_LOCALID",
    ):
        value = os.environ.get(variable, "")
        if value.isdigit():
            return int(value)
    return None


def num_cores() -> int:
    """Cores that this process may use."""
    return len(_cores(0))


def _cores(pid: int) -> set[int]:
    """The cores that a process may use; an empty set if that cannot be known."""
    try:
        return os.sched_getaffinity(pid)
    except OSError:
        return set()


def _is_bound() -> bool:
    """Whether the launcher, our parent, has bound this rank to some of the cores it has itself."""
    return _cores(0) < _cores(os.getppid())


def threads_per_rank(local_size: int) -> int:
    """Threads that each of `local_size` ranks of a node should compute with.

    OMP_NUM_THREADS if it is set; else the cores that the launcher has bound this rank to; else an
    equal share of the node's cores.
    """
    value = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if value.isdigit() and int(value) > 0:
        return int(value)
    return max(1, num_cores() if _is_bound() else num_cores() // local_size)


def prepare_environment() -> None:
    """Settings of MPI libraries, before MPI is initialised; what the user has set stays.

    MPICH: waiting ranks sleep for a moment where there are more ranks than cores. Otherwise they
    poll, and take the core from the rank that they wait for. Costs some 0.1 ms of latency, so not
    where every rank has a core. Open MPI knows by itself.

    Open MPI: one-sided communication without UCX, which prints an error for each of our windows of
    shared memory on machines without a network that it knows. It plays no part in these windows.
    """
    if not _is_bound() and local_ranks() > num_cores():
        os.environ.setdefault("MPIR_CVAR_ENABLE_HEAVY_YIELD", "1")
    os.environ.setdefault("OMPI_MCA_osc", "^ucx")


# -- errors ------------------------------------------------------------------------------------

_PID = os.getpid()  # children made by fork inherit the hooks, but are no ranks
_FORWARDING = 0.5  # seconds that a launcher may take to pass on what a rank wrote before it aborts
_LAST_RESORT = 1.0  # seconds until a rank ends by itself whose MPI_Abort does not return
_EXIT_GRACE = 1.0  # seconds in which ranks that all leave with a failure may end by themselves
STOPPED_STATUS = (
    75  # EX_TEMPFAIL of sysexits.h: all ranks have agreed to stop, and will go on later
)


def abort_on_exception() -> None:
    """End the whole job when this process, or a thread, ends with an exception or a failed exit.

    Without it the other ranks would wait for this one for ever. The traceback is printed first,
    each line marked with the rank. Nothing changes in a job of one rank, or in a forked child.
    A crash (SIGSEGV, SIGBUS, SIGABRT ...) leaves Python's stack.
    """
    if not faulthandler.is_enabled():
        with suppress(OSError, ValueError, AttributeError, RuntimeError):  # no file to write to
            faulthandler.enable()
    if sys.exit is not _exit:
        os._exit = _leave_at_once
        sys.excepthook = partial(_excepthook, sys.excepthook)
        threading.excepthook = partial(_thread_excepthook, threading.excepthook)
        sys.exit = _exit


def _excepthook(
    before: Callable[[type[BaseException], BaseException, TracebackType | None], object],
    kind: type[BaseException],
    value: BaseException,
    trace: TracebackType | None,
) -> None:
    if is_alone():
        before(kind, value, trace)
    else:
        report_and_abort(kind, value, trace)


def _thread_excepthook(
    before: Callable[[threading.ExceptHookArgs], object], args: threading.ExceptHookArgs
) -> None:
    if args.exc_value is None or isinstance(args.exc_value, SystemExit) or is_alone():
        before(args)
    else:
        report_and_abort(args.exc_type, args.exc_value, args.exc_traceback)


class _Exit(SystemExit):
    """What `sys.exit` raises, so that an exit that nobody catches is noticed.

    No hook is called for SystemExit, and a function of atexit does not see the status. But the
    interpreter drops the exception once it has taken the status from it, and does so with no Python
    frame left on the stack; whoever catches one has a frame.
    """

    def __del__(self) -> None:
        if sys._getframe().f_back is None:
            _abort_if_failed(self.code)


_Exit.__name__ = _Exit.__qualname__ = "SystemExit"
_Exit.__module__ = "builtins"


def _exit(status: object = None, /) -> NoReturn:
    """Exit the interpreter by raising SystemExit(status); a failure ends all ranks of the job."""
    raise _Exit(status)


_os_exit = os._exit


def _leave_at_once(status: int) -> NoReturn:
    """`os._exit`, which in a rank ends the job.

    A launcher may take the job for done if the status is 0: MPICH's kills the others then, and often ends with 0.
    """
    if not is_alone():
        end_job([f"left with os._exit({status}): ending the job"], status or 1)
    _os_exit(status)


def _abort_if_failed(code: object) -> None:
    """End the job if `code`, an argument of `sys.exit`, is a failure."""
    status = 0 if code is None else code & 0xFF if isinstance(code, int) else 1
    if status in (0, STOPPED_STATUS) or is_alone():
        return
    # Where all ranks leave because of the same failure, each has said why before the first aborts.
    sys.stdout.flush()
    time.sleep(_EXIT_GRACE)
    end_job([f"left with sys.exit({code!r}): ending the job"], status)


def is_alone() -> bool:
    """Whether no other rank can wait for this process."""
    from mpi4py import MPI

    if os.getpid() != _PID:
        return True
    return not MPI.Is_initialized() or MPI.Is_finalized() or MPI.COMM_WORLD.size == 1


before_abort: list[Callable[[], object]] = []  # called when this process ends the job


def abort(text: str, status: int = 1) -> NoReturn:
    """Write `text` to standard error and end all ranks of the job; does not return.

    The launcher gets time to pass the text on first: some drop what a rank wrote just before it
    aborted. MPI_Abort itself may fail where no memory is left, or wait for ranks that are gone; then this
    process ends by itself, and the launcher ends the others.
    """
    from mpi4py import MPI

    sys.stdout.flush()
    stderr = _real_stderr()
    stderr.write(text)
    stderr.flush()
    with suppress(RuntimeError):  # no memory for a thread
        last_resort = threading.Timer(_LAST_RESORT, _os_exit, [status])
        last_resort.daemon = True
        last_resort.start()
    for call in before_abort:
        with suppress(Exception):
            call()
    time.sleep(_FORWARDING)
    try:
        MPI.COMM_WORLD.Abort(status)
    finally:
        _os_exit(status)


def leave(status: int) -> NoReturn:
    """End this process alone, at once: another rank has said why the job ends."""
    with suppress(Exception):
        sys.stdout.flush()
    _os_exit(status)


def _real_stderr() -> TextIO:
    """Standard error, not what somebody collects it in: torch.distributed does so in a hook of its own."""
    try:
        sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):
        return sys.__stderr__ or sys.stderr
    return sys.stderr


def end_job(lines: Sequence[str], status: int) -> NoReturn:
    """Write lines with this rank's mark, then end all ranks; does not return."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    mark = f"[rank {world.rank} of {world.size} on {socket.gethostname()}]"
    abort("".join(f"{mark} {line}\n" for line in lines), status)


# Attributes of an error that all ranks raise.
_TOLD_BY_ANOTHER = "_told_by_another_rank"
_REPORT = "_report"  # lines
_MAX_TURN = 6  # of the ranks that report where the one whose part it is does not

_E = TypeVar("_E", bound=Exception)


def raised_by_all(error: _E, rank: int, *, teller: int = 0, report: Sequence[str] = ()) -> _E:
    """Mark an error that all ranks are about to raise, so that the job reports it once; return it.

    Args:
        error: of this rank.
        rank: this one.
        teller: the one that reports. If it has caught the error, the next one does, seconds later.
        report: what is written in place of a traceback, which would tell of one rank only.
    """
    with suppress(AttributeError):  # an exception of a user's may have no room for them
        setattr(error, _TOLD_BY_ANOTHER, rank != teller)
        setattr(error, _REPORT, tuple(report))
    return error


def first_with(answers: Sequence[object | None]) -> int | None:
    """The first rank whose answer is not None: the one that tells of an error that all ranks raise."""
    return next((rank for rank, answer in enumerate(answers) if answer is not None), None)


def report_and_abort(
    kind: type[BaseException], value: BaseException, trace: TracebackType | None
) -> None:
    """Print the traceback with this rank's mark, then end all ranks of COMM_WORLD with status 1.

    An error that all ranks raise is reported by one; see `raised_by_all`.
    """
    if getattr(value, _TOLD_BY_ANOTHER, False):
        from mpi4py import MPI

        time.sleep(_EXIT_GRACE * min(1 + MPI.COMM_WORLD.rank, _MAX_TURN))
    report: Sequence[str] = getattr(value, _REPORT, ())
    lines = [f"{kind.__name__}: {report[0]}", *report[1:]] if report else []
    if not report or value.__context__ is not None:  # that is the cause, and has a place of its own
        lines = "".join(traceback.format_exception(kind, value, trace)).splitlines() + lines[1:]
    if is_out_of_memory(value):
        lines.append(
            "out of memory: a higher stage, more ranks, mixed_precision, smaller batches with "
            "zero.accumulate, or torch.utils.checkpoint need less"
        )
    end_job(lines, 1)


# What torch, the C++ library and the start of a thread say; on the host none has its own class.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "std::bad_alloc",
    "can't start new thread",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that there was no memory left, on the host or on a device."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):  # torch.OutOfMemoryError is one
        return any(phrase in str(error).lower() for phrase in _OUT_OF_MEMORY)
    return isinstance(error, MemoryError)
