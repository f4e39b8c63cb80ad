"""Host memory in which a state waits to be written while training goes on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zerompi.checkpoint.table import Slice, TensorTable
from zerompi.report import MemoryLedger

_ALIGNMENT = 64  # bytes


class Copies:
    """One copy of this rank's slices, in memory that stays for the next one.

    Memory that is new costs several times the copy itself: the system has to find and clear its pages.
    To keep it adds nothing to the peak, which is at a save.

    Args:
        memory: where the bytes are counted, among the buffers.
    """

    def __init__(self, memory: MemoryLedger) -> None:
        self._ledger = memory
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, tables: Sequence[TensorTable]) -> list[TensorTable]:
        """The same tables with copies of the slices, valid until the next call. Local.

        Raises:
            RuntimeError: no memory is left.
        """
        sizes = [own.values.nbytes for table in tables for own in table.slices]
        is_pinned = any(own.values.is_cuda for table in tables for own in table.slices)
        self._reserve(sum(map(_aligned, sizes)), is_pinned)
        copied, offset = [], 0
        for table in tables:
            slices: list[Slice] = []
            for own in table.slices:
                slices.append(own._replace(values=self._copy(own.values, offset)))
                offset += _aligned(own.values.nbytes)
            copied.append(TensorTable(table.specs, slices))
        return copied

    def release(self) -> None:
        """Give the memory back."""
        self._ledger.add("buffers", -self._memory.nbytes)
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _reserve(self, nbytes: int, is_pinned: bool) -> None:
        if nbytes > self._memory.nbytes:
            self.release()
            self._memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=is_pinned)
            self._ledger.add("buffers", nbytes)

    def _copy(self, values: Tensor, offset: int) -> Tensor:
        target = self._memory[offset : offset + values.nbytes].view(values.dtype)
        return target.copy_(values.detach())


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
