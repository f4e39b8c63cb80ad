"""Flat or hierarchical: up to which size of a block the flat way is the faster one, as measured.

The flat way sends more bytes between nodes in fewer steps, so it wins for small blocks where a step costs
more than its bytes. `zerompi bench collectives --table FILE` measures a machine; ZEROMPI_ALGORITHM_TABLE names
the file, and ZEROMPI_ALGORITHM forces one of the ways.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from math import log2
from pathlib import Path

from mpi4py import MPI

from zerompi.topology import Topology

FORCE = "ZEROMPI_ALGORITHM"
TABLE = "ZEROMPI_ALGORITHM_TABLE"
COLLECTIVES = ("reduce_scatter", "all_gather")  # an all-reduce is one after the other

_log = logging.getLogger("zerompi")


@dataclass(frozen=True)
class Row:
    """What was measured on one layout.

    Attributes:
        nodes: how many.
        ranks_per_node: on the largest.
        shared_memory: whether the ranks of a node share memory, or send messages to each other.
        collective: one of COLLECTIVES.
        flat_nbytes: largest block, of one rank, up to which flat is faster; 0 if it never is.
    """

    nodes: int
    ranks_per_node: int
    shared_memory: bool
    collective: str
    flat_nbytes: int

    def distance(self, topology: Topology) -> float:
        """How far the layout is from this row's, in doublings."""
        ranks = max(map(len, topology.ranks_of_node))
        return abs(log2(self.nodes / topology.num_nodes)) + abs(log2(self.ranks_per_node / ranks))


# Emulated nodes, 1 Gbit/s, MPICH over TCP: with shared memory hierarchical is 1.6 to 2.3 times as fast for the
# smallest blocks already; by messages it needs 1.1 to 1.35 times as long up to these sizes.
BUILT_IN = tuple(
    Row(2, ranks, shared, collective, 0 if shared else nbytes)
    for ranks, nbytes in ((2, 16 << 10), (4, 32 << 10))
    for shared in (True, False)
    for collective in COLLECTIVES
)


def flat_limits(comm: MPI.Intracomm, topology: Topology, *, shared_memory: bool) -> dict[str, int]:
    """Of each collective, the bytes of a block up to which to take the flat way. Collective.

    Rank 0's environment decides.

    Raises:
        ValueError: it names no table, or no way; on all ranks.
    """
    found: tuple[str, dict[str, int]] | str
    try:
        found = _limits(topology, shared_memory)
    except ValueError as error:
        found = str(error)
    found = comm.bcast(found, root=0)
    if isinstance(found, str):
        raise ValueError(found)
    source, limits = found
    if comm.rank == 0 and any(limits.values()):
        parts = (f"{name} up to {nbytes} bytes of a rank" for name, nbytes in limits.items())
        _say_once(f"{topology!r}: flat {', '.join(parts)}, hierarchical above ({source})")
    return limits


@cache
def _say_once(text: str) -> None:
    _log.info(text)


def _limits(topology: Topology, shared_memory: bool) -> tuple[str, dict[str, int]]:
    forced = os.environ.get(FORCE, "")
    if forced:
        if forced not in ("flat", "hierarchical"):
            raise ValueError(f"{FORCE}: expected flat or hierarchical, got {forced!r}")
        return FORCE, dict.fromkeys(COLLECTIVES, 1 << 62 if forced == "flat" else 0)
    path = os.environ.get(TABLE, "")
    rows = read_table(path) if path else BUILT_IN
    limits = {}
    for collective in COLLECTIVES:
        fitting = [
            r for r in rows if (r.collective, r.shared_memory) == (collective, shared_memory)
        ]
        nearest = min(fitting, key=lambda row: row.distance(topology), default=None)
        limits[collective] = 0 if nearest is None else nearest.flat_nbytes
    return path or "built-in table", limits


def read_table(path: str) -> Sequence[Row]:
    """The rows of a file that `write_table` has written.

    Raises:
        ValueError: it cannot be read, or is no such file.
    """
    try:
        rows = [Row(**row) for row in json.loads(Path(path).read_text(encoding="utf-8"))["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{TABLE}: {path}: expected a table of zerompi bench, got {error}"
        ) from error
    for row in rows:
        _check(path, row)
    return rows


def _check(path: str, row: Row) -> None:
    for name, value in vars(row).items():
        kind = {"shared_memory": bool, "collective": str}.get(name, int)
        is_wrong = type(value) is not kind
        if is_wrong or (kind is int and int(value) < (name != "flat_nbytes")):
            raise ValueError(f"{TABLE}: {path}: {name}: got {value!r}")


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Add `rows` to the table at `path`, in place of those of the same layout and collective."""
    kept = list(read_table(str(path))) if path.exists() else []
    table = {(r.nodes, r.ranks_per_node, r.shared_memory, r.collective): r for r in [*kept, *rows]}
    content = {"rows": [asdict(row) for row in table.values()]}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
