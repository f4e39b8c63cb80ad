"""All-gathers of the parameters of units: where they lie, and when the memory is free again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from zerompi.collectives.all_gather import Ranges, gather_blocks, gather_node_copies
from zerompi.collectives.quantized import (
    Code,
    gather_blocks_quantized,
    gather_node_copies_quantized,
)
from zerompi.comm_thread import Ticket
from zerompi.context import Context
from zerompi.regions import Slot
from zerompi.segment import Segment

if TYPE_CHECKING:
    from zerompi.unit import Unit


class Gather:
    """One all-gather of the parameters of units that lie beside each other in one slot.

    A slot is taken when the gather is made, and free again when the last of the units has resharded.
    The gather itself starts when every rank has taken the slot, so nobody reads in it any more what
    was there before. Where a rank has no slot left (units are gathered all at once, or run in another order),
    all ranks take memory of their own for this gather.

    Collective over the world: construction, in the same order on all ranks.

    Args:
        units: resharded ones of one depth.
        context: of the partition.
        ahead: whether it is done by the communication thread, and `finish` waits for it.
        slot_number: which slot to take, see `_take_slot`; None is the next free one.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        context: Context,
        *,
        ahead: bool,
        slot_number: int | None = None,
    ) -> None:
        self.units = list(units)
        self._context = context
        self._waiting = set(units)  # that are not in use: not yet, or not now
        self._rest = set(units)  # that have not been resharded yet
        self._stayed: set[Unit] = set()  # that were used, and are about to be used again
        self._own_nbytes = 0
        self._slot: Slot | None = None
        self._slot_number = self._take_slot(slot_number)
        self._ticket: Ticket | None = None
        self._segments = [segment for unit in units for segment in unit.segments]
        self._what = f"all-gather of the parameters of {', '.join(unit.name for unit in units)}"
        group = context.world
        if context.node_group and all(segment.is_cached for segment in self._segments):
            group = context.node_group
        self._agreement = group.start_agreement(self._what, self._slot_number)
        for unit in units:
            unit.gather = self
        if ahead:
            context.ahead.append(self)
            known = () if context.attendance.is_open else (self._agreement,)
            try:
                self._ticket = context.thread.submit(self._run, known)
            except BaseException:
                self._release_all()
                raise

    def _take_slot(self, wanted: int | None) -> int:
        """Take a slot, the `wanted` one or any; return its number, from 1, or 0 where none is free."""
        kept = self.units[0].slot
        slots = self._context.slots[self.units[0].depth] if kept is None else [kept]
        for number, slot in enumerate(slots, start=1):
            if wanted in (None, number) and slot.user in (None, self.units[0]):
                slot.user = self if kept is None else self.units[0]
                self._slot = slot
                return number
        return 0

    # -- communication -------------------------------------------------------------------------

    def _run(self) -> None:
        context = self._context
        with context.times.phase("all_gather"):
            context.attendance.announce(
                self._what, "gather", [unit.name for unit in self.units], self._slot_number
            )
            numbers = self._agreement.finish()
            if self._slot_number == 0 or len(set(numbers)) > 1:
                self._leave_slot()
            self._fill(self._segments, self._places(self._segments))

    def _leave_slot(self) -> None:
        if self._slot is not None and self._slot.user is self:
            self._slot.user = None
        self._slot = None

    def _places(self, segments: Sequence[Segment]) -> list[Tensor]:
        sizes = [(segment.layout.padded_numel, segment.dtype) for segment in segments]
        if self._slot is not None:
            self._context.memory.add("buffers", self._slot.take())
            return self._slot.cut(sizes)
        self._own_nbytes = sum(segment.full_nbytes for segment in segments)
        self._context.memory.add("buffers", self._own_nbytes)
        return [self._context.shard_group.allocate(*size) for size in sizes]

    def _fill(self, segments: Sequence[Segment], places: Sequence[Tensor]) -> None:
        keepers = self._context.node_group
        copies: dict[Code | None, list[tuple[Tensor, Ranges]]] = {}
        for segment, place in zip(segments, places, strict=True):
            segment.full = place
            if segment.secondary is not None and segment.is_cached and keepers is not None:
                segment.recall(place)
                gather_blocks(place, segment.node_ranges, keepers)
            elif not segment.is_cached:
                segment.fill_own_block()
                alike = copies.setdefault(segment.weight_code, [])
                alike.append((place, segment.layout.shard_ranges))
        for code, alike in copies.items():
            self._gather(alike, code)
        if keepers is not None:
            for segment in segments:
                segment.keep()

    def _gather(self, copies: Sequence[tuple[Tensor, Ranges]], code: Code | None) -> None:
        """Fill memory, in which each rank's own block is in place, with the blocks of all ranks."""
        group = self._context.shard_group
        if self._slot is not None and self._slot.is_shared:
            if code is None:
                gather_node_copies(copies, group)
            else:
                gather_node_copies_quantized(copies, group, code)
            return
        for full, ranges in copies:
            if code is None:
                gather_blocks(full, ranges, group)
            else:
                gather_blocks_quantized(full, ranges, group, code)

    # -- use -----------------------------------------------------------------------------------

    def finish(self, unit: Unit) -> None:
        """Gather, or wait until it is done, because `unit` is unsharded now.

        What went wrong is raised, and nothing of this gather stays.
        """
        try:
            if unit in self._stayed:
                self._stayed.remove(unit)
                self._context.spared_nbytes += sum(s.gather_nbytes for s in unit.segments)
            elif self._ticket is not None:
                self._ticket.wait()
            else:
                self._context.thread.run(self._run)
        except BaseException:
            self._release_all()
            raise
        self._use(unit)

    def pass_on(self) -> None:
        """Gather for the other ranks' sake only: nothing stays here."""
        try:
            self._run()
        finally:
            self._release_all()

    def _release_all(self) -> None:
        for unit in self.units:
            self.release(unit)

    def _use(self, unit: Unit) -> None:
        self._waiting.discard(unit)
        if not self._waiting and self in self._context.ahead:
            self._context.ahead.remove(self)

    def keep(self, unit: Unit) -> None:
        """Note that `unit` needs its parameters again soon: until then they wait, as if gathered ahead.

        Not in memory of their own, which nobody has planned for.
        """
        if self._slot is None:
            self.release(unit)
            return
        self._stayed.add(unit)
        self._waiting.add(unit)
        if self not in self._context.ahead:
            self._context.ahead.append(self)

    def release(self, unit: Unit) -> None:
        """Note that `unit` needs its parameters no more."""
        if unit in self._waiting:
            self._use(unit)
            self._stayed.discard(unit)
        unit.gather = None
        for segment in unit.segments:
            segment.full = None
        self._rest.discard(unit)
        if not self._rest:
            self._leave_slot()
            self._context.memory.add("buffers", -self._own_nbytes)
            self._own_nbytes = 0

    def settle(self) -> None:
        """Wait until the gather is done, and let go of the units that nobody has used."""
        if self._ticket is not None:
            self._ticket.abandon()
        for unit in list(self._waiting):
            self.release(unit)
