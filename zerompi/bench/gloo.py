"""torch.distributed over gloo among the ranks of an MPI job, for what is measured beside zerompi."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from mpi4py import MPI


@contextmanager
def gloo(comm: MPI.Intracomm) -> Iterator[None]:
    """torch.distributed over gloo among the ranks of `comm`. Collective."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host = comm.bcast("127.0.0.1" if _is_one_host(comm) else socket.gethostname())
    timeout = dist.default_pg_timeout
    store = TCPStore(host, 0, comm.size, True, timeout, False) if comm.rank == 0 else None
    port = comm.bcast(None if store is None else store.port)
    if store is None:
        store = TCPStore(host, port, comm.size, False, timeout, False)
    dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
    try:
        yield
        comm.Barrier()
    finally:
        dist.destroy_process_group()


def _is_one_host(comm: MPI.Intracomm) -> bool:
    return len(set(comm.allgather(socket.gethostname()))) == 1


def local_rank(comm: MPI.Intracomm) -> int:
    """The position of this rank among those of its host. Collective."""
    hosts = comm.allgather(socket.gethostname())
    return hosts[: comm.rank].count(hosts[comm.rank])
