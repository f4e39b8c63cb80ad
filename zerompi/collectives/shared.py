"""Memory that the ranks of one node share (MPI-4.1, section 12.2.3, MPI_Win_allocate_shared)."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from mpi4py import MPI
from torch import Tensor

from zerompi.collectives.fence import RANK_NBYTES, Fence
from zerompi.collectives.waiting import num_node_cores
from zerompi.memory import Flat

PAGE_NBYTES = 4096
STAGING_NBYTES = 4 << 20  # of each rank and half
_SWITCH = "ZEROMPI_SHARED_MEMORY"
# We take at most this part of what is free: of the machine's shared memory, and, where the process has
# a limit, of its address space, in which the windows of all ranks of the node count.
_SHARE_OF_FREE = 0.9
_SHARE_OF_ADDRESSES = 0.25
_LOOKS = 200  # at a fence, before a rank that has a core sleeps
_WHERE_WINDOWS_LIE = "/dev/shm"  # noqa: S108


class Window:
    """Shared memory with one part for each rank of a node; the parts follow each other.

    Collective over `comm`: construction and `close`. The contents are undefined, and no page has a
    place yet: the rank that first touches it decides near which cores it lies.

    Args:
        comm: ranks that share memory.
        part_nbytes: size of each rank's part, in rank order.

    Attributes:
        bytes: the whole window, 1-D, uint8.
        address: where it starts.
    """

    def __init__(self, comm: MPI.Intracomm, part_nbytes: Sequence[int]) -> None:
        whole_pages = [-(-nbytes // PAGE_NBYTES) * PAGE_NBYTES for nbytes in part_nbytes]
        self._comm = comm
        self._win = MPI.Win.Allocate_shared(whole_pages[comm.rank], 1, comm=comm)
        self._win.Lock_all(MPI.MODE_NOCHECK)
        self.starts = [sum(whole_pages[:rank]) for rank in range(comm.size)]
        self.nbytes = sum(whole_pages)
        first = next(rank for rank, nbytes in enumerate(whole_pages) if nbytes)
        self.address = self._win.Shared_query(first)[0].address
        memory = (ctypes.c_char * self.nbytes).from_address(self.address)
        # A storage keeps `memory` alive, so this tells when the last tensor in the window is gone.
        self._memory = weakref.ref(memory)
        with torch.inference_mode(False):
            self.bytes = torch.frombuffer(memory, dtype=torch.uint8)

    def parts(self, offset: int, numel: int, dtype: torch.dtype) -> list[Tensor]:
        """In each rank's part the `numel` elements that start `offset` bytes after its beginning."""
        stop = offset + numel * dtype.itemsize
        return [self.bytes[start + offset : start + stop].view(dtype) for start in self.starts]

    def synchronise(self) -> None:
        """A memory barrier (MPI_Win_sync)."""
        self._win.Sync()

    def close(self) -> None:
        """Free the memory; it stays until the process ends if any rank has a tensor in it. Collective."""
        del self.bytes
        if self._memory() is not None:
            gc.collect()
        if not self._comm.allreduce(self._memory() is not None, MPI.LOR):
            self._win.Unlock_all()
            self._win.Free()


class SharedNode:
    """What the ranks of one node share in one group: a fence, and staging memory.

    Attributes:
        comm: the ranks of the node.
        fence: counts the steps that they take together.
        half: which half of the staging memory was used last.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        progress: Callable[[], object],
        asleep: AbstractContextManager[object],
    ) -> None:
        self.comm = comm
        self._window = Window(comm, [RANK_NBYTES] * comm.size)
        self._window.parts(0, RANK_NBYTES, torch.uint8)[comm.rank].zero_()
        has_core = num_node_cores(comm) >= comm.size  # collective: now the counters of all are zero
        self.fence = Fence(
            self._window.address,
            comm.rank,
            comm.size,
            self._window.synchronise,
            progress,
            asleep,
            looks=_LOOKS if has_core else 0,
        )
        self.half = 0
        self._staging: Window | None = None

    def rows(self, half: int, slots: int, nbytes: int) -> list[list[Flat]]:
        """Of each rank, `slots` pieces of `nbytes` in one of two halves of its staging memory. Collective."""
        if self._staging is None:
            self._staging = Window(self.comm, [2 * STAGING_NBYTES] * self.comm.size)
        parts = self._staging.parts(half * STAGING_NBYTES, slots * nbytes, torch.uint8)
        return [list(part.view(slots, nbytes)) for part in parts]

    def cross(self) -> None:
        """Wait for the others; what this rank has put into its staging memory is there for them."""
        self.fence.cross()

    def close(self) -> None:
        """Free the memory. Collective."""
        for window in (self._staging, self._window):
            if window is not None:
                window.close()


def open_node(
    comm: MPI.Intracomm,
    node_comm: MPI.Intracomm,
    progress: Callable[[], object],
    asleep: AbstractContextManager[object],
) -> SharedNode | None:
    """The shared memory of this rank's node; None on all ranks if a node of `comm` has none.

    Collective. A node has none where the environment variable ZEROMPI_SHARED_MEMORY is 0, where a
    topology calls ranks one node that cannot reach each other's memory, or where there is no room.
    `progress` and `asleep`: see `Fence`.
    """
    wanted = os.environ.get(_SWITCH, "1") != "0"
    reachable = node_comm.Split_type(MPI.COMM_TYPE_SHARED)
    possible = wanted and reachable.size == node_comm.size
    reachable.Free()
    possible = possible and has_room((RANK_NBYTES + 2 * STAGING_NBYTES) * node_comm.size)
    possible = bool(comm.allreduce(possible, MPI.LAND))
    return SharedNode(node_comm, progress, asleep) if possible else None


def has_room(nbytes: int) -> bool:
    """Whether windows of `nbytes` in all fit into this machine's shared memory and our address space."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        with open("/proc/self/statm") as statm:
            limit -= int(statm.read().split()[0]) * resource.getpagesize()
        if nbytes > _SHARE_OF_ADDRESSES * limit:
            return False
    try:
        state = os.statvfs(_WHERE_WINDOWS_LIE)
    except OSError:
        return False
    return nbytes <= _SHARE_OF_FREE * state.f_bavail * state.f_frsize
