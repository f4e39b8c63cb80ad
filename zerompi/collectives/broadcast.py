"""Broadcast: every rank gets the root's values (MPI-4.1, section 6.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zerompi.arrays import copy_values, flat_tensor
from zerompi.collectives import contract
from zerompi.collectives.all_gather import gather_blocks
from zerompi.collectives.group import Group
from zerompi.collectives.lane import on_any_memory
from zerompi.layout import FlatLayout
from zerompi.memory import Flat

_SMALL_NBYTES = 64 << 10


def broadcast(send: Any, recv: Any, group: Group, root: int = 0) -> None:
    """`recv` becomes the root's `send` on all ranks.

    Collective: every rank of the group calls this in the same order.

    Args:
        send: n elements, any shape and dtype, contiguous; read on the root only. May be `recv`.
        recv: n elements of the same dtype; overwritten.
        group: the ranks.
        root: rank whose values all get.

    Raises:
        TypeError, ValueError: wrong arguments on this rank, before any communication.
        MismatchError: ranks disagree on size, dtype or root, or another rank's arguments are wrong.

    See Also:
        `zerompi.autograd.broadcast`.
    """

    def check() -> contract.Call:
        source, out = flat_tensor("send", send), flat_tensor("recv", recv, writable=True)
        contract.require_root(root, group)
        contract.require_alike(source, out)
        contract.require_numel("recv", out, source.numel(), "as send has")
        if not contract.same_memory(source, out):
            contract.require_disjoint(source, out, "send being recv")
        return contract.Call(source, out, contract.signature("broadcast", source, root=root))

    source, out, _ = contract.agreed(group, "broadcast", check)
    _broadcast(source, out, group, root)


@on_any_memory
def _broadcast(source: Flat, out: Flat, group: Group, root: int) -> None:
    if group.rank == root and not contract.same_memory(source, out):
        copy_values(out, source)
    spread(out, group, root)


@on_any_memory
def spread(full: Flat, group: Group, root: int, *, label: str = "broadcast") -> None:
    """`full` becomes the root's, in place. Collective, unchecked.

    Small: the root sends everything to everyone. Large: a block to each, then an all-gather.

    Args:
        full: 1-D; overwritten on the other ranks.
        group: the ranks.
        root: rank whose values all get.
        label: under which the bytes are counted.
    """
    if full.nbytes <= _SMALL_NBYTES:
        _send_from_root([full] * group.size, group, root, label)
        return
    ranges = FlatLayout([(full.numel(),)], group.size).shard_ranges
    index = group.topology.shard_index
    blocks = [full[slice(*ranges[index(rank)])] for rank in range(group.size)]
    _send_from_root(blocks, group, root, label)
    gather_blocks(full, ranges, group, label=label)


def _send_from_root(blocks: Sequence[Flat], group: Group, root: int, label: str) -> None:
    """Block r of the root goes to rank r."""
    if group.rank == root:
        others = [peer for peer in range(group.size) if peer != root]
        group.exchange([(peer, blocks[peer]) for peer in others], [], label)
    else:
        group.exchange([], [(root, blocks[group.rank])], label)
