"""Reduce-scatter: every rank gets one block of the sum over ranks (MPI-4.1, section 6.10)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zerompi.arrays import empty_like, flat_tensor
from zerompi.collectives import contract, staging
from zerompi.collectives.all_gather import Ranges
from zerompi.collectives.group import Group
from zerompi.collectives.lane import on_any_memory
from zerompi.collectives.node import Node
from zerompi.collectives.pipeline import Chunk, overlapped
from zerompi.collectives.summation import sum_in_order
from zerompi.memory import Flat

_CHUNK_NBYTES = 1 << 20
_STAGING_NBYTES = 64 << 20


def reduce_scatter(send: Any, recv: Any, group: Group, op: str = "sum") -> None:
    """Sum over ranks; rank r gets block r.

    Collective: every rank of the group calls this in the same order. float16, bfloat16 and float8 accumulate in
    float32. The order of summation is fixed: ranks ascending; hierarchical: ranks of a node
    ascending, then nodes ascending, partial sums rounded to the dtype.

    Args:
        send: n * size elements, contiguous; left as it is (but for the in-place form).
        recv: n elements of the same dtype; overwritten. May be the rank's own block of `send`.
        group: the ranks.
        op: "sum" or, for floating-point and complex dtypes, "mean".

    Raises:
        TypeError, ValueError: wrong arguments on this rank, before any communication.
        MismatchError: ranks disagree on size, dtype or op, or another rank's arguments are wrong.

    See Also:
        `zerompi.autograd.reduce_scatter`.
    """

    def check() -> contract.Call:
        full, out = flat_tensor("send", send), flat_tensor("recv", recv, writable=True)
        contract.require_alike(full, out)
        contract.require_op(op, full.dtype)
        n = out.numel()
        contract.require_numel("send", full, n * group.size, f"{n} for each of {group.size} ranks")
        own = full[group.rank * n : (group.rank + 1) * n]
        if n and not contract.same_memory(out, own):
            contract.require_disjoint(full, out, "recv being the rank's own block of send")
        return contract.Call(full, out, contract.signature("reduce_scatter", full, op=op))

    full, out, _ = contract.agreed(group, "reduce_scatter", check)
    n = out.numel()
    ranges = [(r * n, (r + 1) * n) for r in range(group.size)]
    reduce_blocks(full, out, ranges, group, scale=contract.scale_of(op, group))


@on_any_memory
def reduce_blocks(
    full: Flat,
    out: Flat,
    ranges: Ranges,
    group: Group,
    *,
    scale: float = 1.0,
    label: str = "reduce_scatter",
    peers: Sequence[Flat] | None = None,
) -> None:
    """`out` = `scale` times the sum over ranks of this rank's block. Collective, unchecked.

    Works in chunks, so that the memory for what other ranks send is bounded (about 64 MiB). With
    shared memory no message is sent inside a node: every rank sums straight out of `peers`, or what
    the others have put into staging memory.

    Args:
        full: 1-D, all blocks of this rank's summand; left as it is.
        out: as many elements as this rank's block; overwritten; may be that block itself.
        ranges: elements [start, stop) of each shard index's block.
        group: the ranks.
        scale: applied once, in the accumulator of the first sum.
        label: under which the bytes are counted.
        peers: the `full` of each rank of this node, in shared memory; on all ranks or on none. They
            may be written again when all ranks have finished with the group's last fence.
    """
    node, topology = group.node_of(full), group.topology
    if group.size == 1:
        sum_in_order([full[slice(*ranges[0])]], out, scale)
        return
    blocks = [slice(*ranges[topology.shard_index(owner)]) for owner in range(group.size)]
    longest = max(block.stop - block.start for block in blocks)
    chunk = min(_CHUNK_NBYTES, _STAGING_NBYTES // (2 * group.size)) // full.element_size()
    is_flat = peers is None and group.is_flat(
        "reduce_scatter", longest * full.element_size(), has_node=node is not None
    )
    number = node.fence.cross() if node is not None and peers is not None else None
    if node is None or is_flat:
        step = _flat_chunk if is_flat else _hierarchical_chunk
    elif peers is None:
        chunk = staging.chunk_numel(group.size, full.dtype)
    elif topology.is_single_node:
        chunk = max(1, longest)
    by_rank = [[memory[block] for block in blocks] for memory in (peers or [full])]

    def reduced(start: int) -> Chunk:
        target = out[start : start + chunk]
        rows = [[block[start : start + chunk] for block in row] for row in by_rank]
        if node is None or is_flat:
            return step(rows[0], target, group, scale, label)
        if peers is None:
            rows = staged_rows(node, rows[0], group)
        return _sum_of_rows(rows, target, group, scale, label)

    overlapped(reduced(start) for start in range(0, longest, chunk))
    if node is not None and number is not None:
        node.fence.finish(number)


def staged_rows(node: Node, parts: Sequence[Flat], group: Group) -> list[list[Flat]]:
    """The parts of every rank of this node; those that nobody else sums are not copied."""
    topology = group.topology
    own_node = topology.node_of[group.rank]
    shown = {
        owner: part
        for owner, part in enumerate(parts)
        if topology.delegate(own_node, owner) != group.rank
    }
    rows = [
        [slot[: part.nbytes].view(part.dtype) for slot, part in zip(row, parts, strict=True)]
        for row in staging.exchange(node, shown, group.size)
    ]
    rows[node.comm.rank] = list(parts)
    return rows


def _sum_of_rows(
    rows: Sequence[Sequence[Flat]], out: Flat, group: Group, scale: float, label: str
) -> Chunk:
    """Sum over this node's ranks in place, then over nodes by messages.

    Args:
        rows: of each rank of this node, in rank order, its part of each owner's block.
        out: this rank's part of the sum.
        group: the ranks.
        scale: applied in the first sum.
        label: under which the bytes are counted.
    """
    topology, rank = group.topology, group.rank
    node = topology.node_of[rank]
    is_single = topology.is_single_node
    partial: dict[int, Flat] = {}
    for owner in range(group.size):
        if topology.delegate(node, owner) == rank:
            own = rows[topology.local_rank_of[rank]][owner]
            partial[owner] = out if is_single else empty_like(own)
            sum_in_order([row[owner] for row in rows], partial[owner], scale)
            group.count_shared(label, (len(rows) - 1) * own.nbytes)
    if not is_single:
        yield from _sum_over_nodes(partial, out, group, label)


def _flat_chunk(parts: list[Flat], out: Flat, group: Group, scale: float, label: str) -> Chunk:
    """Every rank sends part p to rank p, which sums in rank order."""
    rank = group.rank
    others = [peer for peer in range(group.size) if peer != rank]
    staged = {peer: empty_like(out) for peer in others}
    finish = group.start_exchange(
        [(peer, parts[peer]) for peer in others],
        [(peer, staged[peer]) for peer in others],
        label,
    )
    yield
    finish()
    staged[rank] = parts[rank]
    sum_in_order([staged[peer] for peer in range(group.size)], out, scale)


def _hierarchical_chunk(
    parts: list[Flat], out: Flat, group: Group, scale: float, label: str
) -> Chunk:
    """Delegates sum inside each node; one partial sum per node goes to the owner, who sums them."""
    topology, rank = group.topology, group.rank
    node = topology.node_of[rank]
    locals_ = topology.ranks_of_node[node]
    delegate = [topology.delegate(node, owner) for owner in range(group.size)]
    mine = [owner for owner in range(group.size) if delegate[owner] == rank]
    peers = [peer for peer in locals_ if peer != rank]
    staged = {(owner, peer): empty_like(parts[owner]) for peer in peers for owner in mine}
    finish = group.start_exchange(
        [(delegate[o], parts[o]) for o in range(group.size) if delegate[o] != rank],
        [(peer, staged[owner, peer]) for peer in peers for owner in mine],
        label,
    )
    yield
    finish()
    partial = {}
    for owner in mine:
        summands = [parts[owner] if p == rank else staged[owner, p] for p in locals_]
        partial[owner] = empty_like(parts[owner])
        sum_in_order(summands, partial[owner], scale)
    staged.clear()
    yield from _sum_over_nodes(partial, out, group, label)


def _sum_over_nodes(partial: dict[int, Flat], out: Flat, group: Group, label: str) -> Chunk:
    """Sum what the nodes have summed: over the nodes of each group, then over the groups, in order.

    Args:
        partial: of each owner that this rank is the delegate for, the sum of this node.
        out: this rank's sum.
        group: the ranks.
        label: under which the bytes are counted.
    """
    topology, rank = group.topology, group.rank
    own_node, own_group = topology.node_of[rank], topology.group_of(rank)
    collectors = {owner: topology.group_delegate(own_group, owner) for owner in partial}
    nodes = topology.nodes_of_group[own_group]
    received = {
        (owner, node): empty_like(part)
        for owner, part in partial.items()
        if collectors[owner] == rank
        for node in nodes
        if node != own_node
    }
    finish = group.start_exchange(
        [(collectors[owner], part) for owner, part in partial.items() if collectors[owner] != rank],
        [(topology.delegate(node, owner), part) for (owner, node), part in received.items()],
        label,
    )
    yield
    finish()
    sums: dict[int, Flat] = {}
    for owner, part in partial.items():
        if collectors[owner] == rank:
            received[owner, own_node] = part
            is_total = topology.num_groups == 1
            sums[owner] = out if is_total else empty_like(part)
            sum_in_order([received[owner, node] for node in nodes], sums[owner], 1.0)
    if topology.num_groups > 1:
        yield from _sum_over_groups(sums, out, group, label)


def _sum_over_groups(sums: dict[int, Flat], out: Flat, group: Group, label: str) -> Chunk:
    """Send this group of nodes' sums to their owners, and sum what other groups send, in group order."""
    topology, rank = group.topology, group.rank
    own = topology.group_of(rank)
    others = [number for number in range(topology.num_groups) if number != own]
    parts = {number: empty_like(out) for number in others}
    finish = group.start_exchange(
        [(owner, part) for owner, part in sums.items() if owner != rank],
        [(topology.group_delegate(number, rank), part) for number, part in parts.items()],
        label,
    )
    yield
    finish()
    parts[own] = sums[rank]
    sum_in_order([parts[number] for number in range(topology.num_groups)], out, 1.0)
