"""All-gather: every rank gets the blocks of all ranks (MPI-4.1, section 6.7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zerompi.arrays import copy_values, flat_tensor
from zerompi.collectives import contract
from zerompi.collectives.group import Group

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
        contract.require_equal_dtype(block, out)
        n = block.numel()
        contract.require_numel("recv", out, n * group.size, f"{n} of each of {group.size} ranks")
        own = out[group.rank * n : (group.rank + 1) * n]
        if n and not contract.same_memory(block, own):
            contract.require_disjoint(block, out, "send being the rank's own block of recv")
        return contract.Call(block, out, contract.signature("all_gather", block))

    block, out, _ = contract.agreed(group, "all_gather", check)
    n = block.numel()
    own = out[group.rank * n : (group.rank + 1) * n]
    if n and not contract.same_memory(block, own):
        copy_values(own, block)
    gather_blocks(out, [(r * n, (r + 1) * n) for r in range(group.size)], group)


def gather_blocks(full: Tensor, ranges: Ranges, group: Group, *, label: str = "all_gather") -> None:
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

    def block(owner: int) -> Tensor:
        start, stop = ranges[topology.shard_index(owner)]
        return full[start:stop]

    others = [peer for peer in range(group.size) if peer != rank]
    if group.algorithm == "flat":
        group.exchange(
            [(peer, block(rank)) for peer in others],
            [(peer, block(peer)) for peer in others],
            label,
        )
        return
    node = topology.node_of[rank]
    remote = [peer for peer in others if topology.node_of[peer] != node]
    group.exchange(
        [
            (topology.delegate(other, rank), block(rank))
            for other in range(topology.num_nodes)
            if other != node
        ],
        [(owner, block(owner)) for owner in remote if topology.delegate(node, owner) == rank],
        label,
    )
    local = [peer for peer in topology.ranks_of_node[node] if peer != rank]
    handled = {
        peer: [o for o in range(group.size) if topology.delegate(node, o) == peer]
        for peer in topology.ranks_of_node[node]
    }
    group.exchange(
        [(peer, block(owner)) for peer in local for owner in handled[rank]],
        [(peer, block(owner)) for peer in local for owner in handled[peer]],
        label,
    )
