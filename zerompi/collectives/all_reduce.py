"""All-reduce: every rank gets the sum over ranks (MPI-4.1, section 6.9.6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zerompi.arrays import copy_values, flat_tensor
from zerompi.collectives import contract
from zerompi.collectives.all_gather import Ranges, gather_blocks
from zerompi.collectives.group import Group
from zerompi.collectives.lane import on_any_memory
from zerompi.collectives.reduce_scatter import reduce_blocks
from zerompi.layout import FlatLayout
from zerompi.memory import Flat


def all_reduce(send: Any, recv: Any, group: Group, op: str = "sum") -> None:
    """Sum over ranks, on all ranks bit for bit the same.

    Collective: every rank of the group calls this in the same order. Sums as `reduce_scatter` does.

    Args:
        send: n elements, any shape and dtype, contiguous; left as it is. May be `recv`.
        recv: n elements of the same dtype; overwritten.
        group: the ranks.
        op: "sum" or, for floating-point and complex dtypes, "mean".

    Raises:
        TypeError, ValueError: wrong arguments on this rank, before any communication.
        MismatchError: ranks disagree on size, dtype or op, or another rank's arguments are wrong.

    See Also:
        `zerompi.autograd.all_reduce`.
    """

    def check() -> contract.Call:
        source, out = flat_tensor("send", send), flat_tensor("recv", recv, writable=True)
        contract.require_alike(source, out)
        contract.require_op(op, source.dtype)
        contract.require_numel("recv", out, source.numel(), "as send has")
        if not contract.same_memory(source, out):
            contract.require_disjoint(source, out, "send being recv")
        return contract.Call(source, out, contract.signature("all_reduce", source, op=op))

    source, out, _ = contract.agreed(group, "all_reduce", check)
    _reduce(source, out, group, op)


@on_any_memory
def _reduce(source: Flat, out: Flat, group: Group, op: str) -> None:
    if not contract.same_memory(source, out):
        copy_values(out, source)
    ranges = FlatLayout([(out.numel(),)], group.size).shard_ranges
    reduce_all(out, ranges, group, scale=contract.scale_of(op, group))


@on_any_memory
def reduce_all(
    full: Flat,
    ranges: Ranges,
    group: Group,
    *,
    scale: float = 1.0,
    label: str = "all_reduce",
    peers: Sequence[Flat] | None = None,
) -> None:
    """`full` = `scale` times the sum over ranks, in place. Collective, unchecked.

    A reduce-scatter into the own blocks and an all-gather of them; see `reduce_blocks`.
    """
    own = full[slice(*ranges[group.topology.shard_index(group.rank)])]
    reduce_blocks(full, own, ranges, group, scale=scale, label=label, peers=peers)
    if peers is not None:
        group.fence()  # nobody reads `full` any more
    gather_blocks(full, ranges, group, label=label)
