"""Units: parameters that are gathered together, and their state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from zerompi.collectives.headers import Agreement
from zerompi.comm_thread import Ticket
from zerompi.context import Context
from zerompi.errors import ZerompiError
from zerompi.gather import Gather
from zerompi.placement import Placement
from zerompi.refresh import Refresh
from zerompi.regions import Slot, aligned
from zerompi.segment import Segment
from zerompi.units import UnitPlan

_FLAGS_PER_HEADER = 63
_UNREADABLE = 1 << 63  # the flag of a rank with a bucket that the others of its node cannot read


class GradientScale(Protocol):
    """What a sum of gradients is multiplied by.

    Attributes:
        is_weighted: whether ranks have to exchange weights to know it.
    """

    @property
    def is_weighted(self) -> bool:
        """See the class."""

    def __call__(self) -> float:
        """Collective if weighted."""


class UnitState(Enum):
    """What a unit's parameters cost in memory now."""

    SHARDED = "one shard per rank: Psi / N"
    UNSHARDED = "full parameters on every rank: Psi"
    REFRESHING = "full parameters on every rank, which are being refreshed: Psi"


class Unit:
    """The parameters of one module, or of several, that are gathered together.

    Attributes:
        members: the modules, with their names.
        modules: the same without.
        is_resident: whether the full parameters are always there.
        holds: how many callers need the full parameters now (a running forward, `gathered`, a kept
            graph of a double backward); `reshard` does nothing before it is zero.
        gradients: of the segments that are trained.
        depth: how many other units enclose it.
        gather: what has brought the full parameters, or is about to.
        slot: where the node keeps them, with `node_cache`; else None.
    """

    def __init__(self, plan: UnitPlan, context: Context) -> None:
        self.name = plan.name or "(root)"
        self.members = plan.members
        self.modules = [module for _, module in plan.members]
        self.context = context
        kinds: dict[tuple[torch.dtype, bool], list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in plan.parameters:
            kinds.setdefault((parameter.dtype, parameter.requires_grad), []).append(
                (name, parameter)
            )
        self.segments = [Segment(members, context) for members in kinds.values()]
        self.trainable = [segment for segment in self.segments if segment.trainable]
        self.gradients = [segment.gradients for segment in self.trainable]
        for gradients in self.gradients:
            gradients.owner = self
        self.holds = 0
        self.depth = 0
        self.gather: Gather | Refresh | None = None
        self.slot: Slot | None = None
        self._reduction: Ticket | None = None
        self._lent = False
        self.state = UnitState.UNSHARDED

    def allocate(self, node_copies: Sequence[Tensor | None]) -> None:
        """Take memory for the parameters of each segment; see `Segment.allocate`."""
        for segment, node_copy in zip(self.segments, node_copies, strict=True):
            segment.allocate(node_copy)
        self.is_resident = all(segment.is_resident for segment in self.segments)
        if not self.is_resident:
            self.state = UnitState.SHARDED

    def unshard(self) -> None:
        """Make the full parameters visible. Collective over the world unless they are already."""
        if self._lent:
            raise ZerompiError(
                f"{self.name}: forward inside gathered(writable=True); leave the context first"
            )
        if self.state is UnitState.UNSHARDED:
            return
        if self.segments:
            gather = self.gather or Gather([self], self.context, ahead=False)
            gather.finish(self)
            for segment in self.segments:
                segment.install()
        self.state = UnitState.UNSHARDED

    def refresh_agreement(self, *, everything: bool = False) -> Agreement | None:
        """What `refresh` finishes first; None where nothing moves."""
        segments = self.segments if everything else self.trainable
        if not any(segment.refresh_gathers for segment in segments):
            return None
        return self.context.world.start_agreement(f"refresh of the parameters of {self.name}")

    def refresh(self, *, everything: bool = False, agreement: Agreement | None = None) -> None:
        """Bring the parameters up to date with the main weights. Collective over the world.

        Those that are trained; with `everything` the frozen ones, too. `agreement`: from
        `refresh_agreement`, where it was made before.
        """
        agreement = agreement or self.refresh_agreement(everything=everything)
        if agreement is not None:
            agreement.finish()
        for segment in self.segments if everything else self.trainable:
            segment.refresh()
            if everything:
                segment.gradients.forget_residuals()

    def hide(self, refresh: Refresh) -> None:
        """Let nobody see the parameters, which always are there, until `refresh` is done."""
        for segment in self.segments:
            segment.hide()
        self.gather, self.state = refresh, UnitState.REFRESHING

    def check_untouched(self) -> None:
        """Refuse parameters that somebody has changed behind our back.

        Raises:
            ZerompiError: of a node's copy, in place; or their data is not ours any more.
        """
        visible = self.state is UnitState.UNSHARDED
        for segment in self.segments:
            name_of_changed = segment.changed()
            if name_of_changed is not None:
                raise ZerompiError(
                    f"{name_of_changed} was changed in place, once by each rank, but the ranks of "
                    "a node have one copy of it together: change it inside "
                    "zero.gathered(writable=True)"
                )
            name_of_replaced = segment.replaced(visible=visible)
            if name_of_replaced is not None:
                raise ZerompiError(
                    f"somebody has replaced the data of {name_of_replaced} (model.to, .half, "
                    "parameter.data = ...): do so before zerompi.partition, or inside "
                    "zero.gathered(writable=True)"
                )

    def reshard(self, *, stays: bool = False) -> None:
        """Free the full parameters unless somebody still holds them.

        With `stays` they are hidden only, and wait for their next use as if they were gathered ahead of it.
        """
        if self.state is UnitState.SHARDED or self.holds or self.is_resident:
            return
        for segment in self.segments:
            segment.hide()
        if stays and isinstance(self.gather, Gather):
            self.gather.keep(self)
        elif self.gather is not None:
            self.gather.release(self)
        self.state = UnitState.SHARDED

    @property
    def is_free(self) -> bool:
        """Whether the parameters are not here, and nobody gathers them."""
        return bool(self.segments) and self.state is UnitState.SHARDED and self.gather is None

    @property
    def slot_nbytes(self) -> int:
        """Bytes that the full parameters take in a slot."""
        return sum(aligned(segment.full_nbytes) for segment in self.segments)

    @property
    def is_visible(self) -> bool:
        """Whether the parameters are the full ones, as forward and backward need them."""
        return self.state is UnitState.UNSHARDED and not self._lent

    @property
    def is_hidden(self) -> bool:
        """Whether the parameters read as NaN now."""
        return bool(self.segments) and self.state is not UnitState.UNSHARDED and not self._lent

    @property
    def has_gradients(self) -> bool:
        """Whether a gradient of this rank waits to be reduced."""
        return any(any(gradients.present) for gradients in self.gradients)

    @property
    def is_complete(self) -> bool:
        """Whether the running backward pass has brought all gradients that are expected of it."""
        return all([g.collected >= g.expected for g in self.gradients])  # noqa: C419 (takes half the time)

    def reduce(self, scale: GradientScale) -> None:
        """Reduce the gradients of all ranks and install them; nothing moves if no rank has any.

        Collective over the world: the communication thread does it, `settle` waits for it. A
        parameter without a gradient on any rank keeps `grad` as it is. `scale` tells, when all ranks
        are here, what the sum is multiplied by.
        """
        self.settle()
        for gradients in self.gradients:
            gradients.take_back()
        what = f"reduction of the gradients of {self.name}"
        if scale.is_weighted:
            what += ", weighted"
        agreements = self._agreements_on_use(what)
        self._reduction = self.context.thread.submit(
            partial(self._reduce, what, agreements, scale),
            () if self.context.attendance.is_open else agreements,
        )

    def settle(self) -> None:
        """Wait until a reduction that was started is done."""
        if self._reduction is not None:
            reduction, self._reduction = self._reduction, None
            reduction.wait()

    def abandon_reduction(self) -> None:
        """Wait until a reduction that was started is done, however it ends."""
        if self._reduction is not None:
            self._reduction.abandon()
            self._reduction = None

    def _reduce(self, what: str, agreements: Sequence[Agreement], scale: GradientScale) -> None:
        self.context.attendance.announce(what, "reduce", self.name)
        with self.context.times.phase("reduce"):
            used, in_place = self._used_anywhere(agreements)
            factor = scale()
            start = 0
            for gradients in self.gradients:
                part = used[start : start + len(gradients.present)]
                start += len(gradients.present)
                if any(part):
                    gradients.reduce(part, factor, in_place=in_place)
            self._release_regions(was_read=in_place and any(used))

    def discard_gradients(self) -> None:
        """Forget what is not reduced yet, and how a reduction that was started ended."""
        self.abandon_reduction()
        for gradients in self.gradients:
            gradients.discard()
            gradients.collected = 0
        self._release_regions(was_read=False)

    def _release_regions(self, *, was_read: bool) -> None:
        if self.context.stage.gradient is Placement.SHARD:
            for gradients in self.gradients:
                if gradients.region is not None:
                    gradients.region.release(self, was_read=was_read)

    def _agreements_on_use(self, what: str) -> list[Agreement]:
        """Headers that tell which trainable parameters have a gradient on this rank; `what` comes next.

        And whether the other ranks of its node can read its bucket.
        """
        unreadable = 0
        present: list[bool] = []
        for gradients in self.gradients:
            if not unreadable and not gradients.is_readable():
                unreadable = _UNREADABLE
            present += gradients.present
        agreements = []
        for start in range(0, len(present), _FLAGS_PER_HEADER):
            flags = unreadable
            for bit, flag in enumerate(present[start : start + _FLAGS_PER_HEADER]):
                flags |= flag << bit
            agreements.append(self.context.world.start_agreement(what, flags))
        return agreements

    def _used_anywhere(self, agreements: Sequence[Agreement]) -> tuple[list[bool], bool]:
        """For each trainable parameter, whether any rank has a gradient for it.

        And whether the ranks of every node can read each other's buckets.
        """
        count = 0
        for gradients in self.gradients:
            count += len(gradients.present)
        used: list[bool] = []
        in_place = True
        for agreement in agreements:
            union = 0
            for flags in agreement.finish():
                union |= flags
            in_place = in_place and not union & _UNREADABLE
            bits = range(min(count - len(used), _FLAGS_PER_HEADER))
            used += [bool(union >> bit & 1) for bit in bits]
        return used, in_place

    @contextmanager
    def main_weights(self) -> Iterator[None]:
        """Let the parameters be the full main weights while the context lasts. Collective.

        Rank 0's values are taken over at the end.
        """
        values = []
        for segment in self.segments:
            flat = segment.main_values()
            segment.install(flat)
            values.append(flat)
        self._lent = True
        try:
            yield
        finally:
            self._lent = False
            for segment in self.segments:
                if self.state is UnitState.UNSHARDED:
                    segment.install()
                else:
                    segment.hide()
        self.context.settle()
        for segment, flat in zip(self.segments, values, strict=True):
            segment.set_values(flat)
