"""Which ranks share a node, and which nodes are close to each other."""

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
        group_of_node: the group of each node; groups are numbered by their first node.
        nodes_of_group: the nodes of each group, ascending.
    """

    def __init__(
        self,
        comm: MPI.Intracomm | None = None,
        ranks_per_node: int | Sequence[int] | None = None,
        nodes_per_group: int | Sequence[int] | None = None,
    ) -> None:
        """Discover the layout, or take it from `ranks_per_node`.

        Collective over `comm` if `ranks_per_node` is None (MPI-4.1, section 7.4.2,
        MPI_Comm_split_type with MPI_COMM_TYPE_SHARED); local otherwise.

        Args:
            comm: None is COMM_WORLD.
            ranks_per_node: how many consecutive ranks form a node: a number (the last node may be
                smaller) or one number per node.
            nodes_per_group: how many consecutive nodes form a group (a rack, a switch, a dragonfly
                group), in the same way; None is one group of all nodes. Collectives then enter each group once.

        Raises:
            TypeError, ValueError: `ranks_per_node` does not cover the ranks of `comm`, or
                `nodes_per_group` its nodes.
        """
        comm = MPI.COMM_WORLD if comm is None else comm
        if ranks_per_node is None:
            node = comm.Split_type(MPI.COMM_TYPE_SHARED)
            first = node.bcast(comm.rank, root=0)
            node.Free()
            self._set_nodes(comm.allgather(first))
        else:
            self._set_nodes(_from_sizes("ranks_per_node", "ranks", comm.size, ranks_per_node))
        groups = [0] * self.num_nodes
        if nodes_per_group is not None:
            groups = _from_sizes("nodes_per_group", "nodes", self.num_nodes, nodes_per_group)
        self._set_groups(groups)

    @classmethod
    def from_nodes(
        cls, node_of: Sequence[int], group_of_node: Sequence[int] | None = None
    ) -> Topology:
        """The layout with rank r on node `node_of[r]` (any labels); no MPI involved.

        `group_of_node` has the group of each node, in the order in which `node_of` has them first.
        """
        if not node_of:
            raise ValueError("node_of: expected at least one rank, got none")
        topology = cls.__new__(cls)
        topology._set_nodes(node_of)
        groups = [0] * topology.num_nodes if group_of_node is None else group_of_node
        if len(groups) != topology.num_nodes:
            raise ValueError(
                f"group_of_node: expected one of each of {topology.num_nodes} nodes, got {len(groups)}"
            )
        topology._set_groups(groups)
        return topology

    def _set_groups(self, labels: Sequence[int]) -> None:
        self.group_of_node, self.nodes_of_group = _numbered(labels)

    def _set_nodes(self, labels: Sequence[int]) -> None:
        self.node_of, self.ranks_of_node = _numbered(labels)
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

    @property
    def num_groups(self) -> int:
        """Number of groups of nodes."""
        return len(self.nodes_of_group)

    def group_of(self, rank: int) -> int:
        """The group of a rank's node."""
        return self.group_of_node[self.node_of[rank]]

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

    def group_delegate(self, group: int, owner: int) -> int:
        """The rank of a group of nodes that handles, for the group, the block that rank `owner` owns.

        The owner itself in its own group; elsewhere its delegate on the node in the same position.
        """
        if group == self.group_of(owner):
            return owner
        position = self.nodes_of_group[self.group_of(owner)].index(self.node_of[owner])
        nodes = self.nodes_of_group[group]
        return self.delegate(nodes[position % len(nodes)], owner)

    def restrict(self, ranks: Sequence[int]) -> Topology:
        """The layout of a subgroup that has `ranks` in this order."""
        nodes = [self.node_of[rank] for rank in ranks]
        return Topology.from_nodes(
            nodes, [self.group_of_node[node] for node in dict.fromkeys(nodes)]
        )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Topology)
            and self.node_of == other.node_of
            and self.group_of_node == other.group_of_node
        )

    def __hash__(self) -> int:
        return hash((self.node_of, self.group_of_node))

    def __repr__(self) -> str:
        sizes = "+".join(str(len(ranks)) for ranks in self.ranks_of_node)
        nodes = "1 node" if self.is_single_node else f"{self.num_nodes} nodes"
        ranks = "1 rank" if self.size == 1 else f"{self.size} ranks"
        groups = "" if self.num_groups == 1 else f" in {self.num_groups} groups"
        return f"Topology({ranks} on {nodes}{groups}: {sizes})"


def _numbered(labels: Sequence[int]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Labels as numbers in the order in which they come first; and the positions of each number."""
    numbers: dict[int, int] = {}
    number_of = tuple(numbers.setdefault(label, len(numbers)) for label in labels)
    positions: list[list[int]] = [[] for _ in numbers]
    for position, number in enumerate(number_of):
        positions[number].append(position)
    return number_of, tuple(map(tuple, positions))


def _from_sizes(name: str, what: str, size: int, per_part: int | Sequence[int]) -> list[int]:
    """The part of each of `size` things, of which as many as `per_part` says follow each other in a part."""
    if not isinstance(per_part, (list, tuple)):
        length = _number(name, per_part)
        if length < 1:
            raise ValueError(f"{name}: expected at least 1, got {length}")
        return [position // length for position in range(size)]
    sizes = [_number(name, n) for n in per_part]
    if any(n < 1 for n in sizes) or sum(sizes) != size:
        raise ValueError(
            f"{name}: expected positive numbers that sum to {size} {what}, got {sizes}"
        )
    return [part for part, n in enumerate(sizes) for _ in range(n)]


def _number(name: str, value: Any) -> int:
    try:
        if not isinstance(value, bool):
            return index(value)
    except TypeError:
        pass
    raise TypeError(f"{name}: expected a whole number or a sequence of them, got {value!r}")
