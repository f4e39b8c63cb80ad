"""Errors that one rank meets and all ranks raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mpi4py import MPI

from zerompi.activity import progress
from zerompi.errors import CheckpointError, ZerompiError
from zerompi.launch import first_with, raised_by_all
from zerompi.watchdog import waiting


def agree_error(comm: MPI.Intracomm, error: Exception | None) -> None:
    """Raise on all ranks if any rank has an error. Collective.

    A rank with an error raises that (an OSError as CheckpointError); the others raise one of the
    same class with the message `rank r: ...` of the lowest rank that has one.

    Raises:
        ZerompiError, TypeError, ValueError: the rank's own error, or one of its class.
    """
    own = None if error is None else (_shared_class(error), _message(error))
    with waiting(f"{progress.phase}: whether a rank has met an error"):
        errors = comm.allgather(own)
    first = first_with(errors)
    if first is None:
        return
    if error is not None and not isinstance(error, OSError):
        raise raised_by_all(error, comm.rank, teller=first)
    rank = first if error is None else comm.rank
    kind, message = errors[rank]
    told = kind(f"rank {rank}: {message}" if comm.size > 1 else message)
    raise raised_by_all(told, comm.rank, teller=first) from error


@contextmanager
def agreement(comm: MPI.Intracomm) -> Iterator[None]:
    """Context whose end is collective: an exception inside it, on any rank, is raised on all ranks.

    Nothing inside may be collective.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    agree_error(comm, error)


def _shared_class(error: Exception) -> type[Exception]:
    """A class that every rank can import and that is made of a message only."""
    if isinstance(error, OSError):
        return CheckpointError
    for kind in type(error).__mro__:
        if kind in (TypeError, ValueError):
            return kind
        if issubclass(kind, ZerompiError) and kind.__module__.startswith("zerompi."):
            return kind
    return ZerompiError


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__
