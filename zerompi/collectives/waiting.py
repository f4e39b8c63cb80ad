"""Waiting for messages without taking the cores from those who compute.

An MPI library waits by polling, which is best where a core has nothing else to do. Where the ranks of
a node, and their communication threads, have fewer cores than that, a rank that polls delays those that
it waits for. There we ask now and then, and sleep between: the longer, the longer it has taken already, so
that long messages cost few looks, and are noticed late by a small part of their time. The communication
thread asks less often than where the main thread waits for it, or communicates itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import torch
from mpi4py import MPI

from zerompi.activity import computes_beside

_SHORTEST_SLEEP = 2e-5  # seconds
_LONGEST_SLEEP = 1e-3  # beside the main thread; sockets hold more than what comes meanwhile
_LONGEST_IDLE_SLEEP = 1e-4  # where that waits
_SLEEP = 1 / 8  # of the time waited so far


def has_spare_cores(node_comm: MPI.Intracomm) -> bool:
    """Whether this node has a core for every thread that computes, and one for each rank's waiting. Collective."""
    wanted: int = node_comm.allreduce(torch.get_num_threads() + 1)
    return num_node_cores(node_comm) >= wanted


def num_node_cores(node_comm: MPI.Intracomm) -> int:
    """On how many cores the ranks of this node may run, each perhaps bound to some of them. Collective."""
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
    return len(frozenset[int]().union(*node_comm.allgather(frozenset(own))))


def wait_all(requests: Sequence[MPI.Request], *, polls: bool) -> None:
    """Wait for all requests: in the MPI library if `polls`, else asleep between looks."""
    requests = list(requests)
    if polls:
        MPI.Request.Waitall(requests)
        return
    start = time.perf_counter()
    while not MPI.Request.Testall(requests):
        _sleep(start)


def nothing_left() -> None:
    """Waits for an exchange that is over already."""


def wait_some(requests: Sequence[MPI.Request], *, polls: bool, at_once: bool) -> list[int]:
    """Indices of the requests that are done: at least one, waited for as in `wait_all`, unless `at_once`."""
    start = time.perf_counter()
    while True:
        if polls and not at_once:
            done = MPI.Request.Waitsome(list(requests))
        else:
            done = MPI.Request.Testsome(list(requests))
        if done or at_once:
            return sorted(done or ())
        _sleep(start)


def _sleep(start: float) -> None:
    """Sleep between two looks at what has been waited for since `start`."""
    waited = time.perf_counter() - start
    longest = _LONGEST_SLEEP if computes_beside() else _LONGEST_IDLE_SLEEP
    time.sleep(min(max(_SLEEP * waited, _SHORTEST_SLEEP), longest))
