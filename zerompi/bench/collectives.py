"""Collectives of zerompi beside the MPI library's own and a plain copy, by turns in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from zerompi.arrays import host_bytes
from zerompi.bench.gloo import gloo
from zerompi.collectives import Group, all_gather, all_reduce, reduce_scatter
from zerompi.collectives.all_gather import gather_node_copies
from zerompi.collectives.choice import COLLECTIVES as CHOSEN
from zerompi.collectives.choice import Row
from zerompi.collectives.reduce_scatter import reduce_blocks
from zerompi.collectives.shared import Window, has_room
from zerompi.topology import Topology

COLLECTIVES = ("reduce_scatter", "all_gather", "all_reduce")
COPY = "copy"
_SHORTEST = 0.02  # seconds that a measurement should last at least; short calls are repeated
_MOST_CALLS = 200

Call = Callable[[], None]


@dataclass(frozen=True)
class Result:
    """One collective, size, dtype and way of doing it.

    Attributes:
        collective: its name.
        way: "shared" (what lies in the node's shared memory), "staged" (arrays that lie anywhere, through the
            node's shared memory), "messages" (every rank as if it were a node), "MPI" (the library's own),
            "gloo" (of torch.distributed), "copy" (each rank copies the same number of bytes in its own
            memory). On several nodes of several ranks also "flat", and "hierarchical" in place of "staged"
            where no memory is shared.
        nbytes: of the whole buffer on each rank.
        dtype: of its elements.
        seconds: of one call, the slowest rank's; the median of the repetitions.
        ratio: the median over repetitions of MPI's time by this one's; None where MPI has none.
    """

    collective: str
    way: str
    nbytes: int
    dtype: str
    seconds: float
    ratio: float | None

    @property
    def key(self) -> str:
        """What was measured, to find it in another run's results."""
        return f"{self.collective} {self.way} {self.dtype} {self.nbytes}"


def measure(
    comm: MPI.Intracomm,
    collective: str,
    nbytes: int,
    dtype: torch.dtype,
    repeats: int,
    topology: Topology | None = None,
) -> list[Result]:
    """Time all ways of one collective, by turns. Collective over `comm`.

    Args:
        comm: the ranks.
        topology: their layout; None discovers it.
        collective: one of COLLECTIVES.
        nbytes: of the whole buffer, rounded up to equal blocks.
        dtype: of its elements.
        repeats: how often each way takes its turn.
    """
    block = max(1, -(-nbytes // (dtype.itemsize * comm.size)))
    with _ways(comm, collective, block, dtype, topology) as ways:
        times = times_by_turns(comm, ways, repeats)
    own = times.get("MPI")
    return [
        Result(
            collective,
            way,
            block * comm.size * dtype.itemsize,
            str(dtype).removeprefix("torch."),
            median(seconds),
            None if own is None else median(a / b for a, b in zip(own, seconds, strict=True)),
        )
        for way, seconds in times.items()
    ]


def times_by_turns(
    comm: MPI.Intracomm, ways: Mapping[str, Call], repeats: int
) -> dict[str, list[float]]:
    """Seconds of a call of each way, in each of `repeats` turns. Collective."""
    counts = {way: _warm_up(comm, call) for way, call in ways.items()}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, call in ways.items():
            times[way].append(_time(comm, call, counts[way]))
    return times


def _time(comm: MPI.Intracomm, call: Call, count: int) -> float:
    """Seconds of one of `count` calls, the slowest rank's. Collective."""
    comm.Barrier()
    start = time.perf_counter()
    for _ in range(count):
        call()
    return float(comm.allreduce(time.perf_counter() - start, MPI.MAX)) / count


def _warm_up(comm: MPI.Intracomm, call: Call) -> int:
    """Touch all memory; return how many calls make a measurement long enough."""
    _time(comm, call, 2)
    seconds = _time(comm, call, 1)
    return min(_MOST_CALLS, max(1, int(_SHORTEST / max(seconds, 1e-9))))


@contextmanager
def _ways(
    comm: MPI.Intracomm, collective: str, block: int, dtype: torch.dtype, topology: Topology | None
) -> Iterator[dict[str, Call]]:
    groups = _groups(comm, Topology(comm) if topology is None else topology)
    group = next(iter(groups.values()))
    send = torch.ones(block * comm.size, dtype=dtype)
    recv = torch.empty(block * comm.size, dtype=dtype)
    made = {
        "reduce_scatter": _reduce_scatter,
        "all_gather": _all_gather,
        "all_reduce": _all_reduce,
    }[collective](send, recv, groups)
    windows: list[Window] = []
    shared = _shared_way(collective, block, dtype, group, windows)
    if shared is not None:
        made = {"shared": shared, **made}
    copied = recv.clone()

    def copy() -> None:
        copied.copy_(send)

    with gloo(comm):
        made["gloo"] = _of_gloo(collective, send, recv, comm)
        made[COPY] = copy
        yield made
    del shared, made
    for window in windows:
        window.close()
    for made_group in groups.values():
        made_group.close()


def _of_gloo(collective: str, send: Tensor, recv: Tensor, comm: MPI.Intracomm) -> Call:
    own = slice(0, send.numel() // comm.size)
    if collective == "reduce_scatter":  # by its new name where torch has it
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return lambda: scatter(recv[own], send)
    if collective == "all_gather":
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return lambda: gather(recv, send[own])
    reduced = send.clone()
    return lambda: dist.all_reduce(reduced)


def _shared_way(
    collective: str, block: int, dtype: torch.dtype, group: Group, windows: list[Window]
) -> Call | None:
    """What a partition does with buffers in the node's shared memory; None where it cannot."""
    node, size, rank = group.node, group.size, group.rank
    nbytes = block * size * dtype.itemsize
    fits = node is not None and has_room(nbytes * size)
    if node is None or not all(group.agree("windows of the benchmark", int(fits))):
        return None
    ranges = [(r * block, (r + 1) * block) for r in range(size)]
    if collective == "reduce_scatter":
        window = Window(node.comm, [nbytes] * node.comm.size)
        peers = window.parts(0, block * size, dtype)
        peers[node.comm.rank].fill_(1)
        out = torch.empty(block, dtype=dtype)
        windows.append(window)

        def reduce() -> None:
            reduce_blocks(peers[node.comm.rank], out, ranges, group, peers=peers)
            node.fence.wait_finished(node.fence.count)

        return reduce
    if collective == "all_gather":
        window = Window(node.comm, [nbytes, *[0] * (node.comm.size - 1)])
        full = window.parts(0, block * size, dtype)[0]
        full[rank * block : (rank + 1) * block].fill_(1)
        windows.append(window)
        return lambda: gather_node_copies([(full, ranges)], group)
    return None


def _mpi_type(dtype: torch.dtype) -> MPI.Datatype | None:
    return {torch.float32: MPI.FLOAT, torch.float64: MPI.DOUBLE}.get(dtype)


def _groups(comm: MPI.Intracomm, topology: Topology) -> dict[str, Group]:
    """The ranks as a group for each way of zerompi for arrays that lie anywhere; its own way first."""
    groups = {}
    group = Group(comm, topology)
    if group.algorithm == "hierarchical":  # without its choice by size
        group.close()
        group = Group(comm, topology, algorithm="hierarchical")
        groups["hierarchical" if group.node is None else "staged"] = group
        groups["flat"] = Group(comm, topology, algorithm="flat")
    elif group.node is not None:
        groups["staged"] = group
    else:
        group.close()
    groups["messages"] = Group(comm, Topology(comm, ranks_per_node=1))
    return groups


def _ours(call: Callable[[Group], None], groups: Mapping[str, Group]) -> dict[str, Call]:
    return {way: partial(call, group) for way, group in groups.items()}


def choice_rows(comm: MPI.Intracomm, results: Sequence[Result]) -> list[Row]:
    """Up to which block size flat was the faster way, from results of `measure` on the discovered layout."""
    topology = Topology(comm)
    rows = []
    for collective in CHOSEN:
        seconds: dict[int, dict[str, float]] = {}
        for result in results:
            if result.collective == collective:
                seconds.setdefault(result.nbytes, {})[result.way] = result.seconds
        limit, other = 0, ""
        for nbytes, by_way in sorted(seconds.items()):
            other = "staged" if "staged" in by_way else "hierarchical"
            if "flat" not in by_way or by_way["flat"] >= by_way[other]:
                break
            limit = nbytes // topology.size
        if any("flat" in by_way for by_way in seconds.values()):
            ranks = max(map(len, topology.ranks_of_node))
            rows.append(Row(topology.num_nodes, ranks, other == "staged", collective, limit))
    return rows


def _reduce_scatter(send: Tensor, recv: Tensor, groups: Mapping[str, Group]) -> dict[str, Call]:
    group = groups["messages"]
    own = recv[: recv.numel() // group.size]
    ways = _ours(lambda ranks: reduce_scatter(send, own, ranks), groups)
    kind = _mpi_type(send.dtype)
    if kind is not None:
        ways["MPI"] = lambda: group.comm.Reduce_scatter_block(
            [host_bytes(send), own.numel(), kind], [host_bytes(own), own.numel(), kind]
        )
    return ways


def _all_gather(send: Tensor, recv: Tensor, groups: Mapping[str, Group]) -> dict[str, Call]:
    group = groups["messages"]
    own = send[: send.numel() // group.size]
    ways = _ours(lambda ranks: all_gather(own, recv, ranks), groups)
    ways["MPI"] = lambda: group.comm.Allgather(
        [host_bytes(own), MPI.BYTE], [host_bytes(recv), own.nbytes, MPI.BYTE]
    )
    return ways


def _all_reduce(send: Tensor, recv: Tensor, groups: Mapping[str, Group]) -> dict[str, Call]:
    group = groups["messages"]
    ways = _ours(lambda ranks: all_reduce(send, recv, ranks), groups)
    kind = _mpi_type(send.dtype)
    if kind is not None:
        ways["MPI"] = lambda: group.comm.Allreduce(
            [host_bytes(send), send.numel(), kind], [host_bytes(recv), recv.numel(), kind]
        )
    return ways
