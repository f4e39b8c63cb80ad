"""Which ranks share a node."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

from mpi4py import MPI


class Topology:
    """The node layout of the ranks of a communicator: pure data once it is made.

    Attributes:
        node_of: node of each rank; nodes are numbered by their first rank.
        local_rank_of: position of each rank among the ranks of its node.
        ranks_of_node: the ranks of each node, ascending.
    """

    def __init__(
        self,
        comm: MPI.Intracomm | None = None,
        ranks_per_node: int | Sequence[int] | None = None,
    ) -> None:
        """Discover the layout, or take it from `ranks_per_node`.

        Collective over `comm` if `ranks_per_node` is None (MPI-4.1, section 7.4.2,
        MPI_Comm_split_type with MPI_COMM_TYPE_SHARED); local otherwise.

        Args:
            comm: None is COMM_WORLD.
            ranks_per_node: how many consecutive ranks form a node: a number (the last node may be
                smaller) or one number per node.

        Raises:
            TypeError, ValueError: `ranks_per_node` does not cover the ranks of `comm`.
        """
        comm = MPI.COMM_WORLD if comm is None else comm
        if ranks_per_node is None:
            node = comm.Split_type(MPI.COMM_TYPE_SHARED)
            first = node.bcast(comm.rank, root=0)
            node.Free()
            self._set(comm.allgather(first))
        else:
            self._set(_nodes_from_sizes(comm.size, ranks_per_node))

    @classmethod
    def from_nodes(cls, node_of: Sequence[int]) -> Topology:
        """The layout with rank r on node `node_of[r]` (any labels); no MPI involved."""
        if not node_of:
            raise ValueError("node_of: expected at least one rank, got none")
        topology = cls.__new__(cls)
        topology._set(node_of)
        return topology

    def _set(self, labels: Sequence[int]) -> None:
        numbers: dict[int, int] = {}
        self.node_of = tuple(numbers.setdefault(label, len(numbers)) for label in labels)
        ranks: list[list[int]] = [[] for _ in numbers]
        for rank, node in enumerate(self.node_of):
            ranks[node].append(rank)
        self.ranks_of_node = tuple(tuple(part) for part in ranks)
        self.local_rank_of = tuple(
            self.ranks_of_node[node].index(rank) for rank, node in enumerate(self.node_of)
        )

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.node_of)

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return len(self.ranks_of_node)

    @property
    def is_single_node(self) -> bool:
        """Whether all ranks share one node."""
        return self.num_nodes == 1

    def shard_index(self, rank: int) -> int:
        """Which shard `rank` owns: the identity, whatever the layout. The one place that decides it."""
        return rank

    def rank_of_shard(self, index: int) -> int:
        """The reverse of `shard_index`."""
        return index

    def same_node(self, a: int, b: int) -> bool:
        """Whether two ranks share a node."""
        return self.node_of[a] == self.node_of[b]

    def delegate(self, node: int, owner: int) -> int:
        """The rank of `node` that handles, for its node, the block that rank `owner` owns.

        The owner itself on its own node; elsewhere the rank in the same position, so that all ranks
        of a node drive their own inter-node exchange.
        """
        ranks = self.ranks_of_node[node]
        return ranks[self.local_rank_of[owner] % len(ranks)]

    def restrict(self, ranks: Sequence[int]) -> Topology:
        """The layout of a subgroup that has `ranks` in this order."""
        return Topology.from_nodes([self.node_of[rank] for rank in ranks])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Topology) and self.node_of == other.node_of

    def __hash__(self) -> int:
        return hash(self.node_of)

    def __repr__(self) -> str:
        sizes = "+".join(str(len(ranks)) for ranks in self.ranks_of_node)
        nodes = "1 node" if self.is_single_node else f"{self.num_nodes} nodes"
        ranks = "1 rank" if self.size == 1 else f"{self.size} ranks"
        return f"Topology({ranks} on {nodes}: {sizes})"


def _nodes_from_sizes(size: int, ranks_per_node: int | Sequence[int]) -> list[int]:
    if not isinstance(ranks_per_node, (list, tuple)):
        length = _number(ranks_per_node)
        if length < 1:
            raise ValueError(f"ranks_per_node: expected at least 1, got {length}")
        return [rank // length for rank in range(size)]
    sizes = [_number(n) for n in ranks_per_node]
    if any(n < 1 for n in sizes) or sum(sizes) != size:
        raise ValueError(
            f"ranks_per_node: expected positive numbers that sum to {size} ranks, got {sizes}"
        )
    return [node for node, n in enumerate(sizes) for _ in range(n)]


def _number(value: Any) -> int:
    try:
        if not isinstance(value, bool):
            return index(value)
    except TypeError:
        pass
    raise TypeError(f"ranks_per_node: expected a whole number or a sequence of them, got {value!r}")
