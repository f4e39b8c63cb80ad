"""Reduce: the root gets the sum over ranks (MPI-4.1, section 6.9.1)."""

from __future__ import annotations

from zerompi.collectives.group import Group
from zerompi.collectives.lane import on_any_memory
from zerompi.collectives.reduce_scatter import reduce_blocks
from zerompi.layout import FlatLayout
from zerompi.memory import Flat


@on_any_memory
def reduce_to_root(full: Flat, group: Group, root: int, *, label: str = "reduce") -> None:
    """`full` becomes the sum over ranks on the root, in place. Collective, unchecked.

    A reduce-scatter into the own blocks, which then go to the root; see `reduce_blocks`.

    Args:
        full: 1-D; on the other ranks its own block is overwritten by that block of the sum.
        group: the ranks.
        root: rank that gets the sum.
        label: under which the bytes are counted.
    """
    ranges = FlatLayout([(full.numel(),)], group.size).shard_ranges
    blocks = [full[slice(*ranges[group.topology.shard_index(r)])] for r in range(group.size)]
    own = blocks[group.rank]
    reduce_blocks(full, own, ranges, group, label=label)
    if group.rank == root:
        others = [peer for peer in range(group.size) if peer != root]
        group.exchange([], [(peer, blocks[peer]) for peer in others], label)
    else:
        group.exchange([(root, own)], [], label)
