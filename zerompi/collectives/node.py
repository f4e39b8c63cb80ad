"""Staging memory that the ranks of one node can read: what it has to offer, and that of devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mpi4py import MPI

from zerompi import device
from zerompi.collectives.fence import Fence
from zerompi.memory import DeviceArray, Flat


class Node(Protocol):
    """Staging memory of the ranks of one node, in two halves that are used by turns.

    Attributes:
        comm: the ranks of the node.
        fence: counts the steps that they take together.
        half: which half was used last.
    """

    comm: MPI.Intracomm
    fence: Fence
    half: int

    def rows(self, half: int, slots: int, nbytes: int) -> list[list[Flat]]:
        """Of each rank, `slots` pieces of `nbytes` in one half of its memory, uint8."""

    def cross(self) -> None:
        """Wait for the others; what this rank has put into its memory is there for them."""


class DeviceNode:
    """Staging memory on the devices of one node: every rank maps that of the others (CUDA IPC).

    Collective over `comm`: construction and `close`.

    Args:
        comm: the ranks of the node.
        fence: in host memory that they share.
        half_nbytes: size of a half.

    Raises:
        RuntimeError: a rank cannot map another one's memory; on every rank.
    """

    def __init__(self, comm: MPI.Intracomm, fence: Fence, half_nbytes: int) -> None:
        self.comm = comm
        self.fence = fence
        self.half = 0
        self._half_nbytes = half_nbytes
        self._mapped: list[device.Mapped] = []
        self._parts = self._map(2 * half_nbytes)

    def _map(self, nbytes: int) -> Sequence[DeviceArray]:
        problem: str | None = None
        handle = b""
        try:
            self._own = device.Exported(nbytes)
            handle = self._own.handle
        except Exception as error:  # of CuPy, perhaps of the driver
            problem = str(error)
        handles = self.comm.allgather(handle)
        parts: list[DeviceArray] = []
        if all(handles):
            try:
                for rank, other in enumerate(handles):
                    if rank == self.comm.rank:
                        parts.append(self._own.array)
                    else:
                        self._mapped.append(device.Mapped(other, nbytes))
                        parts.append(self._mapped[-1].array)
            except Exception as error:
                problem = str(error)
        problems = self.comm.allgather(problem)
        first = next((text for text in problems if text is not None), None)
        if first is not None:
            self._unmap()
            raise RuntimeError(first)
        return parts

    def rows(self, half: int, slots: int, nbytes: int) -> list[list[Flat]]:
        """See `Node`."""
        start = half * self._half_nbytes
        starts = range(start, start + slots * nbytes, nbytes)
        return [[part[at : at + nbytes] for at in starts] for part in self._parts]

    def cross(self) -> None:
        """See `Node`; also, this rank has read everything that it was going to read."""
        device.ready()
        self.fence.cross()

    def close(self) -> None:
        """Unmap the memory, when nobody reads it any more. Collective."""
        device.ready()
        self._unmap()
        self.fence.cross()  # before any rank frees its own

    def _unmap(self) -> None:
        while self._mapped:
            self._mapped.pop().close()
