"""Memory that is used by turns: regions for buckets, slots for gathered parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from zerompi.collectives.buffer import Buffer
from zerompi.collectives.fence import Fence
from zerompi.collectives.shared import Window

ALIGNMENT = 64  # of what lies in a slot or a region, in bytes; torch's own on the host, too


def aligned(nbytes: int) -> int:
    """The next number of bytes at which something else may begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Settling(Protocol):
    """Whoever has started communication: `settle` waits until it is done, and takes back its result."""

    def settle(self) -> None:
        """Wait."""


class Slot:
    """Memory in which full parameters lie while they are needed: the node's, or this rank's own.

    Args:
        nbytes: how much.
        allocate: takes memory of this rank's own.
        shared: 1-D, uint8: memory that the ranks of the node have together; None is memory of this
            rank's own, taken when it is needed first and given back by `free`.

    Attributes:
        user: who has it now.
    """

    def __init__(
        self,
        nbytes: int,
        allocate: Callable[[int, torch.dtype], torch.Tensor],
        shared: torch.Tensor | None = None,
    ) -> None:
        self._allocate = allocate
        self.user: object | None = None
        self.nbytes = nbytes
        self.is_shared = shared is not None
        self._memory = shared

    def take(self) -> int:
        """Make sure that there is memory; return how many bytes were taken for it."""
        if self._memory is not None:
            return 0
        self._memory = self._allocate(self.nbytes, torch.uint8)
        return self.nbytes

    def free(self) -> int:
        """Give back memory of this rank's own that nobody uses; return how many bytes."""
        if self._memory is None or self.is_shared or self.user is not None:
            return 0
        self._memory = None
        return self.nbytes

    def cut(self, sizes: Sequence[tuple[int, torch.dtype]]) -> list[torch.Tensor]:
        """Tensors of these numbers of elements and dtypes, one behind the other."""
        assert self._memory is not None
        tensors, offset = [], 0
        whole = {dtype: self._memory.view(dtype) for dtype in {dtype for _, dtype in sizes}}
        for numel, dtype in sizes:
            start = offset // dtype.itemsize
            # .data: autograd need not know that other parts of the memory change.
            tensors.append(whole[dtype][start : start + numel].data)
            offset += aligned(numel * dtype.itemsize)
        return tensors


class Region:
    """A piece of every rank's part of a window, that users take by turns.

    A rank may write again what the others read before as soon as all have finished with it; `claim`
    waits for that, and for a reduction of the last user that was started. Not for the communication
    thread, which would wait for itself.

    Attributes:
        user: who has it now.
    """

    def __init__(self, window: Window, rank: int, offset: int, fence: Fence) -> None:
        self.user: Settling | None = None
        self._window = window
        self._rank = rank
        self._offset = offset
        self._fence = fence
        self._read_at = 0  # the fence at which the others were last allowed to read

    def claim(self, user: Settling) -> None:
        """Make `user` the user, unless somebody else is, who is still filling the region."""
        current = self.user  # the communication thread may release it meanwhile
        if current is not None and current is not user:
            current.settle()
        if self.user is None:
            self._fence.wait_finished(self._read_at)
            self.user = user

    def release(self, user: Settling, *, was_read: bool) -> None:
        """Give it back; `was_read`: the others have been reading it since the last fence."""
        if self.user is user:
            if was_read:
                self._read_at = self._fence.count
            self.user = None  # last: who sees this knows when it was read

    def buffer(self, offset: int, numel: int, dtype: torch.dtype) -> Buffer:
        """`numel` elements that start `offset` bytes after the region's beginning."""
        parts = self._window.parts(self._offset + offset, numel, dtype)
        return Buffer(parts[self._rank], parts)
