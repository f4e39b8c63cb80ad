"""Headers: before data moves, ranks tell each other what they are about to do, and 64 bits more.

Inside one node they meet at a fence. Elsewhere a header is a message, and may be sent long before it is
needed: while the data of one collective travels, those of the next are exchanged.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from zerompi.collectives.disagreement import disagreement

if TYPE_CHECKING:
    from zerompi.collectives.fence import Fence
    from zerompi.collectives.group import Group

# A digest of what a rank is about to do (0: whatever the others do), and flags.
Header = tuple[int, int]


class Agreement:
    """One header of each rank of a group.

    Every rank begins the agreements of a group in the same order, and finishes them in that order.

    Args:
        group: the ranks.
        signature: what comes next on this rank, as a text for people; None goes along with whatever
            the others do.
        flags: 64 bits for the other ranks.
    """

    __slots__ = ("_group", "digest", "everyone", "flags", "is_void", "request", "signature")

    def __init__(self, group: Group, signature: str | None, flags: int) -> None:
        self._group = group
        self.signature = signature
        self.digest = 0 if signature is None else _digest(signature)
        self.flags = flags
        self.request: MPI.Request | None = None
        self.everyone: NDArray[np.uint64]
        self.is_void = False

    def begin(self) -> bool:
        """Send this rank's header ahead of `finish`; return whether it has been sent.

        Not where ranks meet at a fence, nor while a header is void: then `finish` sends it.
        """
        headers = self._group.headers
        return headers is not None and headers.send_ahead(self)

    def cancel(self) -> None:
        """Let a header be void that was sent, because this rank will not do what it says."""
        self.is_void = True

    def finish(self) -> tuple[int, ...]:
        """Make sure that all ranks are about to do the same. Collective.

        Returns:
            The flags of all ranks.

        Raises:
            MismatchError: ranks have different signatures; raised on all, naming all.
        """
        group = self._group
        if group.headers is None:
            return (self.flags,)
        group.note_agreement(self.signature or "what the others do")
        headers = group.headers.exchange(self)
        if not _are_alike(headers):
            raise disagreement(group.comm, self.signature or "nothing of its own")
        return tuple(flags for _, flags in headers)


class Headers(Protocol):
    """How the ranks of a group exchange headers."""

    def send_ahead(self, agreement: Agreement) -> bool:
        """Send a header if it may go ahead of those of earlier work that is not done."""

    def exchange(self, agreement: Agreement) -> Sequence[Header]:
        """The headers of all ranks. Collective."""

    def gather_words(self, word: int) -> list[int]:
        """64 bits of each rank, which are no header. Collective."""

    def close(self) -> None:
        """Free what is needed for this alone. Collective."""


class FenceHeaders:
    """Headers of the ranks of one node, which meet at a fence in shared memory."""

    def __init__(self, fence: Fence) -> None:
        self._fence = fence

    def send_ahead(self, agreement: Agreement) -> bool:
        """Never: a fence is passed where it stands."""
        return False

    def exchange(self, agreement: Agreement) -> Sequence[Header]:
        """See `Headers`."""
        return self._meet(agreement.digest, agreement.flags)

    def gather_words(self, word: int) -> list[int]:
        """See `Headers`."""
        return [flags for _, flags in self._meet(0, word)]

    def _meet(self, digest: int, flags: int) -> Sequence[Header]:
        number = self._fence.arrive(digest, flags)
        self._fence.wait(number)
        return self._fence.headers(number)

    def close(self) -> None:
        """See `Headers`: the fence is the node's."""


class MessageHeaders:
    """Headers as messages: row n holds the n-th header of each rank.

    A rank that has sent headers ahead may not come to what they say, since something has failed. These
    are void. It catches up with them at its next agreement, and where a void header has met another one,
    all ranks go on as if neither had been sent.

    Collective over `group`: construction and `close`.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._comm = group.comm.Dup()
        self._lock = threading.Lock()
        self._open: deque[Agreement] = deque()  # sent and not finished
        self._count = 0  # headers that this rank has sent

    def send_ahead(self, agreement: Agreement) -> bool:
        """See `Headers`."""
        with self._lock:
            if any(earlier.is_void for earlier in self._open):
                return False
            self._send(agreement)
        return True

    def exchange(self, agreement: Agreement) -> Sequence[Header]:
        """See `Headers`."""
        if agreement.request is None:
            with self._lock:
                while self._open:
                    self._close_first()
                self._send(agreement)
        while True:
            self._wait_for(agreement)  # without the lock: other headers may go ahead
            with self._lock:
                headers = self._headers_of(agreement)
                if _are_alike(headers) or not self._forget_void():
                    self._open.remove(agreement)
                    return headers

    def gather_words(self, word: int) -> list[int]:
        """See `Headers`; on the group's communicator, as headers may be under way on the own one."""
        words = np.empty(self._group.size, dtype=np.uint64)
        own = np.array([word], dtype=np.uint64)
        self._group.wait_for([self._group.comm.Iallgather(own, words)])
        return cast("list[int]", words.tolist())

    def _close_first(self) -> None:
        """Finish the first header, which is void."""
        first = self._open[0]
        self._wait_for(first)
        if _are_alike(self._headers_of(first)) or not self._forget_void():
            self._open.popleft()

    def _forget_void(self) -> bool:
        """After headers that are not alike, forget all rows if one of them was void. Collective.

        The headers of this rank that are not void are sent again.
        """
        facts = self._group.comm.allgather((self._count, self._open[0].is_void))
        if not any(is_void for _, is_void in facts):
            return False
        valid = [agreement for agreement in self._open if not agreement.is_void]
        for _ in range(self._count, max(count for count, _ in facts)):
            self._send(Agreement(self._group, None, 0))
        for agreement in self._open:
            self._wait_for(agreement)
        self._open.clear()
        for agreement in valid:
            self._send(agreement)
        return True

    def _send(self, agreement: Agreement) -> None:
        own = np.array([agreement.digest, agreement.flags], dtype=np.uint64)
        agreement.everyone = np.empty((self._comm.size, 2), dtype=np.uint64)
        agreement.request = self._comm.Iallgather(own, agreement.everyone)
        self._count += 1
        self._open.append(agreement)

    def _wait_for(self, agreement: Agreement) -> None:
        assert agreement.request is not None
        self._group.wait_for([agreement.request])

    @staticmethod
    def _headers_of(agreement: Agreement) -> Sequence[Header]:
        return cast("list[Header]", agreement.everyone.tolist())

    def close(self) -> None:
        """See `Headers`."""
        self._comm.Free()


def _are_alike(headers: Sequence[Header]) -> bool:
    return len({digest for digest, _ in headers} - {0}) <= 1


@lru_cache(maxsize=4096)
def _digest(signature: str) -> int:
    return int.from_bytes(blake2b(signature.encode(), digest_size=8).digest(), "little")
