"""Collectives on buffers of devices, with each transport that works, by turns in one run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from mpi4py import MPI

from zerompi import cuda_aware, device
from zerompi.bench.collectives import COPY, Call, Result, times_by_turns
from zerompi.collectives import Group, all_gather, all_reduce, reduce_scatter
from zerompi.memory import HOST, Space
from zerompi.topology import Topology

_SWITCH = "ZEROMPI_DEVICE_TRANSPORT"
_OF_DEVICE = "device"


def measure(
    comm: MPI.Intracomm,
    collective: str,
    nbytes: int,
    dtype: torch.dtype,
    repeats: int,
    topology: Topology | None = None,
) -> list[Result]:
    """Time one collective on CuPy arrays with each transport, by turns. Collective over `comm`.

    The arguments are those of `zerompi.bench.collectives.measure`. Each rank has its device
    (`zerompi.use_device`). The ways are "device copy" (inside the device) and "device", the transport and,
    on several nodes of several ranks, "flat" or "hierarchical". CUDA-aware MPI is tried where every rank's
    library says that it is, or ZEROMPI_DEVICE_TRANSPORT asks for it; that variable chooses the only one.
    """
    block = max(1, -(-nbytes // (dtype.itemsize * comm.size)))
    send, recv = _buffer(block * comm.size, dtype), _buffer(block * comm.size, dtype)
    with _groups(comm, Topology(comm) if topology is None else topology) as groups:
        ways: dict[str, Call] = {
            way: _synchronised(partial(_call(collective, comm.rank, block), send, recv, group))
            for way, group in groups.items()
        }
        ways[f"{_OF_DEVICE} {COPY}"] = _synchronised(partial(_copy, recv, send))
        times = times_by_turns(comm, ways, repeats)
    return [
        Result(
            collective,
            way,
            block * comm.size * dtype.itemsize,
            str(dtype).removeprefix("torch."),
            median(seconds),
            None,
        )
        for way, seconds in times.items()
    ]


def _buffer(numel: int, dtype: torch.dtype) -> Any:
    """A CuPy array of zeros; of a dtype that CuPy lacks, a tensor."""
    has_torch = torch.cuda.is_available()
    place = torch.device("cuda", torch.cuda.current_device()) if has_torch else HOST.device
    tensor = device.allocate(numel, dtype, Space(place, is_device=True))
    array = device.as_cupy(tensor)
    array.fill(0)
    device.synchronise()
    return array if str(dtype) == f"torch.{array.dtype.name}" else tensor


def _copy(recv: Any, send: Any) -> None:
    target, source = (
        device.as_cupy(each) if isinstance(each, torch.Tensor) else each for each in (recv, send)
    )
    target[:] = source


def _call(collective: str, rank: int, block: int) -> Callable[[Any, Any, Group], None]:
    own = slice(rank * block, (rank + 1) * block)
    if collective == "reduce_scatter":
        return lambda send, recv, group: reduce_scatter(send, recv[own], group)
    if collective == "all_gather":
        return lambda send, recv, group: all_gather(send[own], recv, group)
    return all_reduce


def _synchronised(call: Call) -> Call:
    def synchronised() -> None:
        call()
        device.synchronise()

    return synchronised


@contextmanager
def _groups(comm: MPI.Intracomm, topology: Topology) -> Iterator[dict[str, Group]]:
    """A group for each way, with its transport."""
    plain = Group(comm, topology)
    algorithms = ["flat", "hierarchical"] if plain.algorithm == "hierarchical" else [None]
    forced = os.environ.get(_SWITCH) or None
    is_aware = all(comm.allgather(cuda_aware.detect().is_aware))
    has_node = all(comm.allgather(plain.node is not None))
    plain.close()
    names = ["staged", *["cuda-aware"] * is_aware, *["ipc"] * has_node]
    groups: dict[str, Group] = {}
    try:
        for name in names if forced is None else [forced]:
            os.environ[_SWITCH] = name
            for algorithm in algorithms:
                group = Group(comm, topology, algorithm=algorithm)  # type: ignore[arg-type]
                group.transport()
                groups[" ".join([_OF_DEVICE, name, *([algorithm] if algorithm else [])])] = group
    finally:
        if forced is None:
            os.environ.pop(_SWITCH, None)
    yield groups
    for group in groups.values():
        group.close()
