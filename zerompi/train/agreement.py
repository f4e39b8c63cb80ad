"""Input is checked on every rank; all ranks agree on the outcome before they go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mpi4py import MPI

from zerompi.errors import ZerompiError
from zerompi.train.config import InputError
from zerompi.train.memory import is_out_of_memory

_T = TypeVar("_T")


def agree(comm: MPI.Intracomm, work: Callable[[], _T]) -> _T:
    """Do `work` on every rank; if it fails on one, all ranks raise the same InputError.

    Collective. `work` must not communicate, unless it fails on all ranks or on none. A ValueError (InputError
    is one), OSError or ZerompiError counts as bad input; running out of memory does not.
    """
    result: _T | None = None
    text = None
    try:
        result = work()
    except OSError as error:
        if is_out_of_memory(error):
            raise
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except (ValueError, ZerompiError) as error:
        text = str(error)
    texts: list[str | None] = comm.allgather(text)
    failed = [(rank, text) for rank, text in enumerate(texts) if text is not None]
    if failed:
        rank, text = failed[0]
        where = "" if len(failed) == comm.size else f"rank {rank}: "
        raise InputError(where + " ".join(text.split()))
    return result  # type: ignore[return-value]
