"""Who of the ranks takes part: inside `Zero.join` some have nothing more to do and go along with the others.

Outside of it all ranks run the same operations, and nothing here communicates. Inside, a rank that
still works *announces* each collective operation before it starts it, and a rank that has nothing more to
do *listens* for what comes next, to take its part in that with nothing of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from zerompi.collectives.group import Group
from zerompi.errors import ZerompiError


class Attendance:
    """Tells the ranks of one partition which of them are active.

    Attributes:
        is_open: whether this rank is inside `join`.
        active: the ranks that took part of their own accord in the last operation; outside of `join`, all.
    """

    _opened: ClassVar[Attendance | None] = None  # of this process

    def __init__(self, world: Group) -> None:
        self._world = world
        self.is_open = False
        self.is_following = False
        self.active = list(range(world.size))

    @property
    def first(self) -> int:
        """The lowest active rank: it stands in for rank 0."""
        return self.active[0]

    @contextmanager
    def open(self, when_idle: Callable[[Callable[[], None]], None]) -> Iterator[None]:
        """While the context lasts, operations are announced.

        After an exception also those are that this rank has started and that wait for others: these take
        them for announced. `when_idle` calls a function when there are none left.

        Raises:
            ZerompiError: it is open already, or another partition's is.
        """
        if Attendance._opened is not None:
            raise ZerompiError("join: expected no enclosing join of any partition, got one")
        Attendance._opened, self.is_open = self, True
        self.active = list(range(self._world.size))
        try:
            yield
        finally:
            Attendance._opened = None
            when_idle(self._close)

    def _close(self) -> None:
        self.is_open = False
        self.active = list(range(self._world.size))

    def announce(self, what: str, operation: str, *arguments: Any) -> None:
        """Tell the ranks that listen what comes next; the arguments are those of the first active rank.

        Collective over the world inside `join`, unless this rank itself goes along with the others.

        Args:
            what: for people, and so that active ranks that disagree are noticed.
            operation: for `listen`.
            arguments: for `listen`; anything that can be pickled.

        Raises:
            ZerompiError: another partition's `join` is open; its listeners would not hear this.
        """
        if not self.is_open:
            if Attendance._opened is not None and self._world.size > 1:
                raise ZerompiError(
                    f"{what}: this partition communicates inside the join() of another one, where ranks "
                    "may be missing; leave that context first"
                )
            return
        if not self.is_following:
            self._take_attendance(f"{what}, inside join()")
            if len(self.active) < self._world.size:
                self._world.comm.bcast((operation, arguments), root=self.first)

    def listen(self) -> tuple[str, tuple[Any, ...]] | None:
        """What the active ranks do next, and its arguments; None if all ranks listen. Collective."""
        if not self._take_attendance(None):
            return None
        heard: tuple[str, tuple[Any, ...]] = self._world.comm.bcast(None, root=self.first)
        return heard

    def _take_attendance(self, what: str | None) -> bool:
        """Find out who is active now; return whether anybody is."""
        flags = self._world.agree(what, int(what is not None))
        active = [rank for rank, flag in enumerate(flags) if flag]
        if active:
            self.active = active
        return bool(active)

    @contextmanager
    def following(self) -> Iterator[None]:
        """While the context lasts, what this rank does has been announced by others."""
        self.is_following = True
        try:
            yield
        finally:
            self.is_following = False
