"""Bytes between nodes, flat and hierarchical, on a node layout that is only claimed.

    mpiexec -n 4 python hierarchy.py

Takes the four ranks for two nodes of two ranks, reduce-scatters 4 blocks of 250 float32 numbers,
and prints the bytes that all ranks together have sent between nodes and inside them.
"""

from __future__ import annotations

import numpy as np
from mpi4py import MPI

import zerompi
from zerompi.collectives import Group, reduce_scatter

comm = MPI.COMM_WORLD
topology = zerompi.Topology(comm, ranks_per_node=2)
for algorithm in ("flat", "hierarchical"):
    group = Group(comm, topology, algorithm=algorithm)
    send = np.full(250 * comm.size, comm.rank, dtype=np.float32)
    recv = np.empty(250, dtype=np.float32)
    reduce_scatter(send, recv, group)
    assert (recv == sum(range(comm.size))).all()
    between = comm.allreduce(group.traffic.total("reduce_scatter", "inter_node"))
    inside = comm.allreduce(group.traffic.total("reduce_scatter", "intra_node"))
    if comm.rank == 0:
        print(f"{algorithm}: {between} bytes between nodes, {inside} inside", flush=True)
    group.close()
