"""Stopping before the end, in time and on all ranks at once: signals, and the end of the job's time."""

from __future__ import annotations

import atexit
import math
import signal
import time
from types import FrameType, TracebackType
from typing import ClassVar

import numpy as np
from mpi4py import MPI

from zerompi.activity import progress
from zerompi.job_time import seconds_to_end
from zerompi.launch import STOPPED_STATUS
from zerompi.watchdog import signal_bell, waiting

_TIME_IS_OVER = 1 << 10  # among the reasons, beside numbers of signals
_MARGIN = 120.0  # seconds kept for a checkpoint ...
_MARGIN_SHARE = 0.05  # ... but no more than this part of the time that there is

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def _leave_undisturbed() -> None:
    """Let no signal end this process any more, whose ranks have agreed to stop and which is at its end.

    srun sends SIGTERM to the ranks that still leave when the first one has left with `exit_status`, and would
    itself end with that of the signal: the job would not be queued again. No rank is gone before all of them
    are in MPI_Finalize, which comes after this.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """While the context lasts, what asks for a stop is remembered, and all ranks learn of it together.

    That is SIGTERM, SIGUSR1 or SIGUSR2, which do not end the process then, and the approaching end of
    the time: of `max_time`, or of the job where the batch system tells: Slurm does, and PBS, LSF and
    Flux are asked by the first rank of COMM_WORLD (elsewhere a script can set ZEROMPI_END_TIME, in
    seconds since 1970). The end approaches when what is left may
    not suffice for another step like the longest one so far, and the checkpoint::

        with zerompi.StopRequest() as stop:
            for batch in batches:
                ...
                optimizer.step()
                if stop.requested():
                    zero.save("checkpoints/latest")
                    raise SystemExit(stop.exit_status)

    Args:
        max_time: seconds from now, by which everything should be saved; None leaves it to the batch
            system; 0 is no limit.
        margin: seconds before the end that are kept for the checkpoint; None is 120, or 5 % of the time
            that there is, if that is less.

    Attributes:
        exit_status: for the process to end with, so that a batch script knows that the job is to
            be queued again: 75 (EX_TEMPFAIL of sysexits.h).
        reason: why, when a stop was requested: a signal's name, or "the end of its time"; else "".

    Raises:
        ValueError: a wrong argument, or on entry, outside the main thread, which alone gets signals.
    """

    exit_status: ClassVar[int] = STOPPED_STATUS

    def __init__(self, max_time: float | None = None, *, margin: float | None = None) -> None:
        for name, value in (("max_time", max_time), ("margin", margin)):
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected seconds, 0 or more, got {value!r}")
        now = time.monotonic()
        if max_time is None:
            left = seconds_to_end(asks=MPI.COMM_WORLD.rank == 0)
        else:
            left = max_time or math.inf
        if margin is None:
            margin = min(_MARGIN, _MARGIN_SHARE * left)
        self.reason = ""
        self._signal = 0
        self._end = now + left - margin
        self._last_look = math.inf  # not yet
        self._longest = 0.0  # seconds between two looks
        self._before: dict[signal.Signals, object] = {}
        self._rings_bell = False

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._remember)
        # Python's handlers wait until the main thread's call returns, of MPI perhaps; the bell does not.
        bell = signal_bell()
        if bell is not None:
            others = signal.set_wakeup_fd(bell, warn_on_full_buffer=False)
            self._rings_bell = others == -1
            if not self._rings_bell:
                signal.set_wakeup_fd(others)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._rings_bell:
            signal.set_wakeup_fd(-1)
        progress.terminated_at = None
        if self.reason:
            atexit.register(_leave_undisturbed)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def requested(self, comm: MPI.Intracomm | None = None) -> bool:
        """Whether any rank of `comm` (None: COMM_WORLD) has been asked to stop. Collective.

        To be called once in a step, always at the same place: the longest time between two calls is
        what a step may take.
        """
        own = np.array([self.look()], dtype=np.int64)
        everyone = np.empty_like(own)
        with waiting("whether a stop was requested"):
            (MPI.COMM_WORLD if comm is None else comm).Allreduce(own, everyone, MPI.MAX)
        return self.conclude(int(everyone[0]))

    def look(self) -> int:
        """This rank's own part of `requested`, for those who exchange numbers anyway: 0, or a reason."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._last_look)
        self._last_look = now
        return self._signal or (_TIME_IS_OVER if now + self._longest > self._end else 0)

    def conclude(self, largest: int) -> bool:
        """What `requested` says, given the largest number that `look` has returned on any rank."""
        if largest:
            is_signal = largest != _TIME_IS_OVER
            self.reason = signal.Signals(largest).name if is_signal else "the end of its time"
        return bool(largest)
