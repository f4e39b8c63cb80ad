"""One rank, one device: which of a node's devices is this rank's."""

from __future__ import annotations

import os
import socket

from mpi4py import MPI

from zerompi import device
from zerompi.errors import ZerompiError
from zerompi.launch import local_rank

_SWITCH = "ZEROMPI_SHARE_DEVICES"


def use_device(comm: MPI.Intracomm | None = None, *, share: bool = False) -> int:
    """Make one of the node's devices this rank's, for torch.cuda and CuPy; return its number.

    Collective: every rank of `comm` calls this, before it puts anything on a device. Only devices that
    the process sees (CUDA_VISIBLE_DEVICES) count. A rank that sees one takes it: the launcher has chosen.
    Else the rank with local number i, by the launcher or else by MPI, takes device i.

    Args:
        comm: the ranks that must have different devices; None is COMM_WORLD.
        share: let several ranks have the same one; so does the environment variable
            ZEROMPI_SHARE_DEVICES=1.

    Raises:
        ZerompiError: a rank sees no device, or two ranks have got the same one and may not share it; on
            every rank, before any device is used.
    """
    comm = MPI.COMM_WORLD if comm is None else comm
    number, identity = _choose(comm)
    answers = comm.allgather((socket.gethostname(), identity))
    _check(answers, share=share or os.environ.get(_SWITCH) == "1")
    device.use(number)
    return number


def _choose(comm: MPI.Intracomm) -> tuple[int, str | None]:
    """The number of this rank's device, and what tells it from all others of the machine."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    by_mpi = node.rank
    node.Free()
    seen = device.count()
    if not seen:
        return 0, None
    told = local_rank()
    number = (by_mpi if told is None else told) % seen
    return number, device.identity(number)


def _check(answers: list[tuple[str, str | None]], *, share: bool) -> None:
    blind = [rank for rank, (_, identity) in enumerate(answers) if identity is None]
    if blind:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise ZerompiError(
            f"use_device: expected a device on every rank, got none on {len(blind)} of {len(answers)}, "
            f"first rank {blind[0]} on {answers[blind[0]][0]} (here CUDA_VISIBLE_DEVICES is "
            f"{visible!r}, CuPy {'installed' if device.is_installed() else 'not installed'})"
        )
    if share:
        return
    users: dict[tuple[str, str | None], int] = {}
    for rank, place in enumerate(answers):
        if place in users:
            raise ZerompiError(
                f"use_device: expected a device for each rank, got ranks {users[place]} and {rank} on "
                f"the same one of {place[0]}; start fewer ranks on a node, let the launcher give each "
                f"rank its own, or set {_SWITCH}=1"
            )
        users[place] = rank
