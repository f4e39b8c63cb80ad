"""The communication thread: one queue, so that collectives start in one order on all ranks.

MPI moves data inside MPI calls only (MPI-4.1, section 6.12 leaves progress to the library), and a rank
that waits at a fence computes nothing. A thread that makes these calls lets the other one compute
meanwhile, with every MPI library that gives MPI_THREAD_MULTIPLE.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Protocol

import torch
from mpi4py import MPI

from zerompi import device
from zerompi.activity import COMM_THREAD, idle
from zerompi.errors import ZerompiError

_SWITCH = "ZEROMPI_COMM_THREAD"

_M_ARENA_MAX = -8  # of mallopt(3) of the GNU C library

_log = logging.getLogger("zerompi")


class Agreement(Protocol):
    """What work finds out first: whether all ranks are about to do it. See `collectives/headers.py`."""

    def begin(self) -> bool:
        """Tell the other ranks already now; whether that has been possible."""

    def cancel(self) -> None:
        """The work will not be done."""


class Ticket:
    """One piece of work in the queue.

    Args:
        work: what to do.
        agreements: all those of its ranks that it will finish, in order, if these are known.
        on_raise: called when `wait` raises what went wrong.
        handover: with device buffers and another thread, what keeps their streams in order.

    Attributes:
        is_announced: whether no other rank has to wait for what this one agrees to.
        is_done: whether the work has ended, well or not.
        error: what it raised.
    """

    def __init__(
        self,
        work: Callable[[], None],
        agreements: Sequence[Agreement],
        on_raise: Callable[[], None],
        handover: device.Handover | None,
    ) -> None:
        self._work = work
        self._agreements = agreements
        self.is_announced = False
        self._on_raise = on_raise
        self._handover = handover
        # Held until the work is done. There are several tickets for each unit and step, and an Event
        # takes ten times as long to make and to set.
        self._running = threading.Lock()
        self._running.acquire()
        self.is_done = False
        self.error: BaseException | None = None

    def announce(self) -> None:
        """Begin the agreements."""
        self.is_announced = bool(self._agreements) and all(a.begin() for a in self._agreements)

    def retract(self) -> None:
        """The work will not be done, or not to its end."""
        for agreement in self._agreements:
            agreement.cancel()

    def wait(self) -> None:
        """Wait until the work is done; raise what it raised."""
        self.abandon()
        if self.error is not None:
            self._on_raise()
            raise self.error

    def abandon(self) -> None:
        """Wait until the work is done, however it ends."""
        if not self.is_done:
            with idle(), self._running:
                pass
        if self._handover is not None:
            self._handover.join()

    def run(self) -> BaseException | None:
        """Do the work; return what it raised. `end` has to follow."""
        try:
            with nullcontext() if self._handover is None else self._handover.inside():
                self._work()
        except BaseException as error:
            return error
        return None

    def end(self, error: BaseException | None) -> None:
        """Let those know who wait, once; `error`: of the work, or before it."""
        self.error = error
        self.is_done = True
        self._running.release()


class _Done(Ticket):
    """Of work that the caller has done itself: there is nothing to wait for."""

    def __init__(self) -> None:
        self.is_done, self.error = True, None

    def abandon(self) -> None:
        pass


_DONE = _Done()


class CommThread:
    """Does the collectives of one partition, in the order in which they are submitted.

    Every rank submits the same work in the same order. What fails cancels what is queued behind it,
    and what is submitted until the error has been raised: where a ticket of these, or the end of the
    queue, is waited for.

    Work is *announced* to the other ranks when it is submitted, unless what is in the queue before it has
    yet to agree on something. So ranks agree on it while the data of earlier work travels.

    Args:
        is_wanted: whether there is anything to overlap; else, or where MPI does not allow several
            threads to call it, all work is done at once by the caller.
    """

    def __init__(self, *, is_wanted: bool) -> None:
        self._queue: deque[Ticket] = deque()
        self._lock = threading.RLock()  # of the queue, and of all that follows
        self._sleeps = False  # whether the thread waits, or is about to wait, for `_awake`
        self._awake = threading.Lock()
        self._awake.acquire()
        self._last: Ticket | None = None
        self._error: BaseException | None = None  # not raised yet
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._is_busy = False
        self._unannounced = 0  # pieces of work in the queue or under way
        self._afterwards: list[Callable[[], None]] = []
        if is_wanted and _is_possible():
            _share_heap()
            self._thread = threading.Thread(target=self._loop, name=COMM_THREAD, daemon=True)
            self._thread.start()

    @property
    def overlaps(self) -> bool:
        """Whether work is done beside the caller's."""
        return self._thread is not None

    def submit(self, work: Callable[[], None], agreements: Sequence[Agreement] = ()) -> Ticket:
        """Queue `work`; it is done after everything that was submitted before.

        `agreements`: all that it will finish, in order; none if these are not known yet.
        """
        if self._thread is None:
            work()
            return _DONE
        ticket = Ticket(work, agreements, self._forget_error, device.hand_over())
        with self._lock:
            if self._is_closed:
                raise ZerompiError("this partition is closed")
            self._last = ticket
            if self._error is not None:
                ticket.end(self._error)
            else:
                if not self._unannounced:
                    ticket.announce()
                self._unannounced += not ticket.is_announced
                self._queue.append(ticket)
                self._rouse()
        return ticket

    def _rouse(self) -> None:
        """Let the thread look at the queue; with the lock."""
        if self._sleeps:
            self._sleeps = False
            self._awake.release()

    def _forget_error(self) -> None:
        with self._lock:
            self._error = self._last = None

    def drain(self) -> None:
        """Wait until everything that was submitted is done; raise what went wrong, once."""
        if self._last is not None:
            last, self._last = self._last, None
            last.wait()

    def run(self, work: Callable[[], None]) -> None:
        """Do `work` after everything that was submitted before, and wait for it."""
        if self._last is None or self._last.is_done:
            self.drain()
            work()
        else:
            self.submit(work).wait()

    def when_idle(self, work: Callable[[], None]) -> None:
        """Do `work`, which is short and local, when everything that was submitted has ended, well or not.

        Does not wait for that.
        """
        with self._lock:
            if self._queue or self._is_busy:
                self._afterwards.append(work)
                return
        work()

    def close(self) -> None:
        """End the thread, after everything that was submitted."""
        if self._thread is None:
            return
        with self._lock:
            self._is_closed = True
            self._rouse()
        self._thread.join()
        self._thread = None

    def _loop(self) -> None:
        torch.set_grad_enabled(False)  # of this thread
        while (ticket := self._next()) is not None:
            error = ticket.run()
            ended = [ticket] if error is None else [ticket, *self._break(ticket, error)]
            with self._lock:
                self._is_busy = False
                self._unannounced -= sum(not each.is_announced for each in ended)
                while self._afterwards and not self._queue:
                    self._afterwards.pop(0)()
            for each in ended:
                each.end(error)

    def _next(self) -> Ticket | None:
        """Wait for a ticket, and take it from the queue; None at the end of the partition."""
        while True:
            with self._lock:
                if self._queue:
                    self._is_busy = True
                    return self._queue.popleft()
                if self._is_closed:
                    return None
                self._sleeps = True
            self._awake.acquire()

    def _break(self, ticket: Ticket, error: BaseException) -> list[Ticket]:
        """Accept nothing until `error` of `ticket` has been raised; return what was queued."""
        with self._lock:
            self._error = error
            rest = list(self._queue)
            self._queue.clear()
            for each in (ticket, *rest):
                each.retract()
        return rest


@cache
def _share_heap() -> None:
    """Let threads that start from now on allocate where the others do.

    A heap of its own would reserve 64 MiB of addresses, and keep what this thread needed at most.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def _is_possible() -> bool:
    """Whether a thread may communicate beside the caller's."""
    return os.environ.get(_SWITCH, "1") != "0" and _may_call_mpi()


@cache
def _may_call_mpi() -> bool:
    """Whether MPI lets several threads call it; said once if not."""
    if MPI.Query_thread() >= MPI.THREAD_MULTIPLE:
        return True
    if MPI.COMM_WORLD.rank == 0:
        _log.warning(
            "communication does not overlap with computation: the MPI library was initialised "
            "without MPI_THREAD_MULTIPLE"
        )
    return False
