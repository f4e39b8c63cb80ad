"""Refreshes of parameters beside the computation: each unit waits for its own where it is used next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from zerompi.context import Context

if TYPE_CHECKING:
    from zerompi.unit import Unit

RefreshTime = Literal["eager", "ahead"]


class Refresh:
    """Brings the parameters of one unit up to date with the main weights, in the communication thread.

    Until the unit is used they read as NaN, and are never old or half new.

    Collective over the world: construction, in the same order on all ranks.

    Args:
        unit: with its full parameters visible.
        context: of the partition.
    """

    def __init__(self, unit: Unit, context: Context) -> None:
        self._unit = unit
        self._context = context
        self._agreement = unit.refresh_agreement()
        known = () if self._agreement is None else (self._agreement,)
        self._ticket = context.thread.submit(self._run, known)
        context.ahead.append(self)
        unit.hide(self)

    def _run(self) -> None:
        with self._context.times.phase("refresh"):
            self._unit.refresh(agreement=self._agreement)

    def finish(self, unit: Unit) -> None:
        """Wait until the parameters are up to date; raise what went wrong, also to whoever asks again."""
        if self in self._context.ahead:
            self._context.ahead.remove(self)
            self._ticket.wait()
        elif self._ticket.error is not None:
            raise self._ticket.error
        unit.gather = None

    def release(self, unit: Unit) -> None:
        """Nothing to give back: the parameters stay where they are."""

    def settle(self) -> None:
        """Wait, and let the parameters be seen; after a failure they stay hidden."""
        self._ticket.abandon()
        if self._ticket.error is None:
            self._unit.unshard()
