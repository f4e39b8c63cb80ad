"""Where a run computes: on the host, or each rank on a device of its own."""

from __future__ import annotations

import torch
from mpi4py import MPI

from zerompi import device
from zerompi.local_device import use_device
from zerompi.train.agreement import agree
from zerompi.train.config import InputError

HOST = torch.device("cpu")


def why_not() -> str | None:
    """What keeps this process from computing on a device; None if nothing does."""
    if not torch.cuda.is_available():
        return "torch sees none"
    if not device.is_installed():
        return "CuPy is not installed"
    return None


def choose(wish: str, comm: MPI.Intracomm, *, share: bool) -> torch.device:
    """The device of this rank. Collective.

    Args:
        wish: "cpu"; "cuda"; or "auto", which is "cuda" where every rank sees a device.
        comm: the ranks that must have different devices.
        share: whether several may have the same one.

    Raises:
        InputError: there is none, or too few; the same on all ranks.
    """
    problems = comm.allgather(why_not())
    if wish == "cpu" or (wish == "auto" and any(problems)):
        return HOST
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise InputError(
                f"--device: expected a CUDA device on every rank, got none on rank {rank}: {problem}"
            )
    number: int = agree(comm, lambda: use_device(comm, share=share))
    return torch.device("cuda", number)
