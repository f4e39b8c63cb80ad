"""All-gather: every rank gets the blocks of all ranks (MPI-4.1, section 6.7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from zerompi.arrays import copy_values, flat_tensor
from zerompi.collectives import contract, staging
from zerompi.collectives.group import Group
from zerompi.collectives.lane import on_any_memory
from zerompi.collectives.node import Node
from zerompi.memory import Flat
from zerompi.topology import Topology

Ranges = Sequence[tuple[int, int]]


def all_gather(send: Any, recv: Any, group: Group) -> None:
    """Gather the blocks of all ranks in rank order.

    Collective: every rank of the group calls this in the same order.

    Args:
        send: n elements; any shape and dtype, contiguous. May be the rank's own block of `recv`.
        recv: n * size elements of the same dtype; overwritten.
        group: the ranks.

    Raises:
        TypeError, ValueError: wrong arguments on this rank, before any communication.
        MismatchError: ranks disagree on size or dtype, or another rank's arguments are wrong.

    See Also:
        `zerompi.autograd.all_gather`.
    """

    def check() -> contract.Call:
        out, block = flat_tensor("recv", recv, writable=True), flat_tensor("send", send)
        contract.require_alike(block, out)
        n = block.numel()
        contract.require_numel("recv", out, n * group.size, f"{n} of each of {group.size} ranks")
        own = out[group.rank * n : (group.rank + 1) * n]
        if n and not contract.same_memory(block, own):
            contract.require_disjoint(block, out, "send being the rank's own block of recv")
        return contract.Call(block, out, contract.signature("all_gather", block))

    block, out, _ = contract.agreed(group, "all_gather", check)
    _gather(block, out, group)


@on_any_memory
def _gather(block: Flat, out: Flat, group: Group) -> None:
    n = block.numel()
    own = out[group.rank * n : (group.rank + 1) * n]
    if n and not contract.same_memory(block, own):
        copy_values(own, block)
    gather_blocks(out, [(r * n, (r + 1) * n) for r in range(group.size)], group)


@on_any_memory
def gather_blocks(full: Flat, ranges: Ranges, group: Group, *, label: str = "all_gather") -> None:
    """Fill `full` in place with the blocks of all ranks. Collective, unchecked.

    Args:
        full: 1-D; this rank's block is in place, the others are overwritten.
        ranges: elements [start, stop) of each shard index's block; of any length, also none.
        group: the ranks.
        label: under which the bytes are counted.
    """
    if group.size == 1:
        return
    topology, rank = group.topology, group.rank
    blocks = _blocks(full, ranges, group)
    others = [peer for peer in range(group.size) if peer != rank]
    shared = group.node_of(full)
    longest = max(block.nbytes for block in blocks)
    if group.is_flat("all_gather", longest, has_node=shared is not None):
        group.exchange(
            [(peer, blocks[rank]) for peer in others],
            [(peer, blocks[peer]) for peer in others],
            label,
        )
        return
    gather_from_nodes([blocks], group, label)
    node = topology.node_of[rank]
    handled = {
        peer: [o for o in range(group.size) if topology.delegate(node, o) == peer]
        for peer in topology.ranks_of_node[node]
    }
    if shared is not None:
        _share_in_node(shared, blocks, handled, group, label)
        return
    local = [peer for peer in topology.ranks_of_node[node] if peer != rank]
    group.exchange(
        [(peer, blocks[owner]) for peer in local for owner in handled[rank]],
        [(peer, blocks[owner]) for peer in local for owner in handled[peer]],
        label,
    )


def gather_node_copies(
    copies: Sequence[tuple[Flat, Ranges]], group: Group, *, label: str = "all_gather"
) -> None:
    """Fill what the node has one copy of with the blocks of all ranks. Collective, unchecked.

    Inside the node nothing moves: each rank receives only what it is the delegate for, directly
    into the copies. On return they are complete on all ranks of the node.

    Args:
        copies: of each, 1-D memory that the ranks of this node share, in which each rank's own block
            is in place; and elements [start, stop) of each shard index's block, of any length.
        group: the ranks; with shared memory.
        label: under which the bytes are counted.
    """
    assert group.node is not None
    if not group.topology.is_single_node:
        blocks = [_blocks(full, ranges, group) for full, ranges in copies]
        gather_from_nodes(blocks, group, label)
    group.node.fence.cross()


def _blocks(full: Flat, ranges: Ranges, group: Group) -> list[Flat]:
    """The block of each rank."""
    return [full[slice(*ranges[group.topology.shard_index(rank)])] for rank in range(group.size)]


def gather_from_nodes(buffers: Sequence[Sequence[Flat]], group: Group, label: str) -> None:
    """Each block enters each other node once, through the delegate of its owner there.

    Args:
        buffers: of each buffer, the block of each rank.
        group: the ranks.
        label: under which the bytes are counted.
    """
    for sends, recvs in _steps_between_nodes(group.topology, group.rank):
        group.exchange(
            [(peer, blocks[owner]) for blocks in buffers for peer, owner in sends],
            [(peer, blocks[owner]) for blocks in buffers for peer, owner in recvs],
            label,
        )


_Messages = list[tuple[int, int]]  # peer, and owner of the block


@lru_cache(maxsize=64)
def _steps_between_nodes(topology: Topology, rank: int) -> list[tuple[_Messages, _Messages]]:
    """What a rank sends and receives: first between groups of nodes, then inside its group."""
    node = topology.node_of[rank]
    own_group = topology.group_of(rank)
    strangers = [o for o in range(topology.size) if topology.group_of(o) != own_group]
    entering = [owner for owner in strangers if topology.group_delegate(own_group, owner) == rank]
    steps = []
    if topology.num_groups > 1:
        others = [group for group in range(topology.num_groups) if group != own_group]
        sends = [(topology.group_delegate(group, rank), rank) for group in others]
        steps.append((sends, [(owner, owner) for owner in entering]))
    held = sorted([rank, *entering])
    neighbours = [n for n in topology.nodes_of_group[own_group] if n != node]
    sends = [(topology.delegate(n, owner), owner) for owner in held for n in neighbours]
    recvs = [
        (holder, owner)
        for owner in range(topology.size)
        if topology.delegate(node, owner) == rank
        and topology.node_of[holder := topology.group_delegate(own_group, owner)] != node
    ]
    steps.append((sends, recvs))
    return steps


def _share_in_node(
    node: Node, blocks: Sequence[Flat], handled: Mapping[int, list[int]], group: Group, label: str
) -> None:
    """Pass the blocks that each rank of the node handles on to the others, through staging memory."""
    rank = group.rank
    chunk = staging.chunk_numel(group.size, blocks[0].dtype)
    longest = max(block.numel() for block in blocks)
    for start in range(0, longest, chunk):
        parts = [block[start : start + chunk] for block in blocks]
        rows = staging.exchange(node, {o: parts[o] for o in handled[rank]}, group.size)
        for row, (peer, owners) in zip(rows, handled.items(), strict=True):
            for owner in owners if peer != rank else ():
                copy_values(parts[owner], row[owner][: parts[owner].nbytes])
                group.count_shared(label, parts[owner].nbytes)
