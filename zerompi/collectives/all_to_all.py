"""All-to-all: every rank sends one block to every rank (MPI-4.1, section 6.8)."""

from __future__ import annotations

from typing import Any

from zerompi.arrays import copy_values, flat_tensor
from zerompi.collectives import contract
from zerompi.collectives.group import Group
from zerompi.collectives.lane import on_any_memory
from zerompi.memory import Flat


def all_to_all(send: Any, recv: Any, group: Group) -> None:
    """Block r of `send` goes to rank r; block r of `recv` comes from rank r.

    Collective: every rank of the group calls this in the same order.

    Args:
        send: n * size elements, any shape and dtype, contiguous; left as it is.
        recv: n * size elements of the same dtype; overwritten; apart from `send`.
        group: the ranks.

    Raises:
        TypeError, ValueError: wrong arguments on this rank, before any communication.
        MismatchError: ranks disagree on size or dtype, or another rank's arguments are wrong.

    See Also:
        `zerompi.autograd.all_to_all`.
    """

    def check() -> contract.Call:
        source, out = flat_tensor("send", send), flat_tensor("recv", recv, writable=True)
        contract.require_alike(source, out)
        if source.numel() % group.size:
            raise ValueError(
                f"send: expected a multiple of {group.size} elements, got {source.numel()}"
            )
        contract.require_numel("recv", out, source.numel(), "as send has")
        contract.require_disjoint(source, out, "nothing else: there is no in-place form")
        return contract.Call(source, out, contract.signature("all_to_all", source))

    source, out, _ = contract.agreed(group, "all_to_all", check)
    swap_blocks(source, out, group)


@on_any_memory
def swap_blocks(source: Flat, out: Flat, group: Group, *, label: str = "all_to_all") -> None:
    """The equal blocks of `source` to their ranks, theirs into `out`; 1-D. Collective, unchecked."""
    n = source.numel() // group.size
    sends = [source[rank * n : (rank + 1) * n] for rank in range(group.size)]
    recvs = [out[rank * n : (rank + 1) * n] for rank in range(group.size)]
    copy_values(recvs[group.rank], sends[group.rank])
    others = [peer for peer in range(group.size) if peer != group.rank]
    group.exchange(
        [(peer, sends[peer]) for peer in others],
        [(peer, recvs[peer]) for peer in others],
        label,
    )
