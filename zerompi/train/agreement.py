"""Input is checked on every rank; all ranks agree on the outcome before they go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mpi4py import MPI

from zerompi.errors import ZerompiError
from zerompi.launch import is_out_of_memory
from zerompi.train.config import InputError
from zerompi.watchdog import waiting

_T = TypeVar("_T")


def agree_on_root(comm: MPI.Intracomm, work: Callable[[], _T]) -> _T:
    """Do `work` on rank 0; all ranks return its result, or raise one InputError. Collective."""
    result, text = _attempt(work) if comm.rank == 0 else (None, None)
    with waiting("rank 0, for what it decides alone"):
        shared: tuple[_T, str | None] = comm.bcast((result, text), root=0)
    if shared[1] is not None:
        raise InputError(shared[1])
    return shared[0]


def agree(comm: MPI.Intracomm, work: Callable[[], _T]) -> _T:
    """Do `work` on every rank; if it fails on one, all ranks raise the same InputError.

    Collective. `work` must not communicate, unless it fails on all ranks or on none. A ValueError
    (InputError is one), OSError or ZerompiError counts as bad input; running out of memory does
    not.
    """
    result, text = _attempt(work)
    with waiting("whether a rank has met wrong input"):
        texts: list[str | None] = comm.allgather(text)
    failed = [(rank, text) for rank, text in enumerate(texts) if text is not None]
    if failed:
        rank, text = failed[0]
        raise InputError(text if len(failed) == comm.size else f"rank {rank}: {text}")
    return result  # type: ignore[return-value]


def _attempt(work: Callable[[], _T]) -> tuple[_T | None, str | None]:
    """The result of `work`, or what is wrong, in one line."""
    try:
        return work(), None
    except OSError as error:
        if is_out_of_memory(error):
            raise
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except (ValueError, ZerompiError) as error:
        text = str(error)
    return None, " ".join(text.split())
