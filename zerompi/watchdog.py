"""The watchdog: a thread of each process that ends the job when a wait takes too long, or a rank is gone.

Nothing else would: a rank that waits for one that never comes waits for ever, and not every launcher
notices a process that ends in the middle with status 0. The thread sleeps; twice a second it looks
at the table of `activity`, answers ranks that ask for it, and it wakes when its neighbour dies.
"""

from __future__ import annotations

import atexit
import faulthandler
import math
import os
import select
import signal
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import NoReturn

from mpi4py import MPI

from zerompi import launch
from zerompi.activity import State, Wait, Waiting, hang_report, longest_wait, own_state, progress

TIMEOUT_VARIABLE = "ZEROMPI_TIMEOUT"
_DEFAULT_TIMEOUT = 1800.0  # seconds

_POLL = 0.5  # seconds between looks
_ANSWER_TIME = 5.0  # seconds that the other ranks may take to tell where they are
_DEATH_GRACE = 1.0  # seconds that the launcher gets to end the job, whose report is the better one
_ABORT_GRACE = 1.0  # the same, where a rank has ended the job and said why
_STOP_PATIENCE = 1.0  # seconds of a wait after SIGTERM until a rank asks whether others are there
_PING_PERIOD = 1.0  # seconds between two questions
_PING_TIME = 3.0  # seconds that an answer may take
_LAST_RESORT = 30.0  # seconds after which a process whose end fails, too, ends by force
_ASK, _ANSWER, _GOODBYE, _ENDING, _PING, _PONG = 1, 2, 3, 4, 5, 6


def seconds_allowed() -> float:
    """How long a wait may take, by ZEROMPI_TIMEOUT; infinite if that is 0.

    Raises:
        ValueError: it is no number of seconds.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, "").strip()
    try:
        seconds = float(text) if text else _DEFAULT_TIMEOUT
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise ValueError(f"{TIMEOUT_VARIABLE}: expected seconds, or 0 for no limit, got {text!r}")
    return seconds or math.inf


def waiting(what: str) -> Wait:
    """A context for a call outside of a group that waits for other ranks."""
    if not launch.is_alone():
        _watchdog()
    return Wait(what)


def signal_bell() -> int | None:
    """A descriptor for `signal.set_wakeup_fd`, by which the watchdog learns of SIGTERM; None if alone."""
    return None if launch.is_alone() else _watchdog().bell


class Watch:
    """Lets the ranks of one communicator ask each other where they are, and notice who is gone.

    Collective over `comm`: construction and `close`. Each rank has an eye on the next one in the same
    process namespace. Where one process does not see another, as on another node, waiting too long
    tells; after SIGTERM, which srun sends when ranks are gone, the last rank of a node asks the first
    one of the next whether it is there.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        seconds_allowed()
        self.comm = comm.Dup()
        self.rank, self.size = self.comm.rank, self.comm.size
        self.answers: dict[int, State] = {}
        self.asked_by: set[int] = set()
        self._pids: list[tuple[object, int]] = self.comm.allgather((_namespace(), os.getpid()))
        spaces = [space for space, _ in self._pids]
        near = [rank for rank, space in enumerate(spaces) if space == spaces[self.rank]]
        at = near.index(self.rank)
        self._before, self._next = near[at - 1], near[(at + 1) % len(near)]
        firsts = [rank for rank, space in enumerate(spaces) if spaces.index(space) == rank]
        following = firsts[(firsts.index(near[0]) + 1) % len(firsts)]
        # The rank of another node that this one asks; None if there is one nearer.
        self._far = following if self.rank == near[-1] and len(firsts) > 1 else None
        self._ping: threading.Timer | None = None  # what happens if there is no answer
        self._next_ping = -math.inf
        self._is_closing = False
        self._has_left = False
        self._died_at = math.inf
        self._ends_at = math.inf  # this process, as another rank has ended the job
        self._sent: list[MPI.Request] = []
        self.pidfd = None if self._next == self.rank else _open_pidfd(self._pids[self._next][1])
        if self.pidfd is not None:
            weakref.finalize(self, _close, self.pidfd)
        self.can_talk = MPI.Query_thread() >= MPI.THREAD_MULTIPLE
        _watchdog().add(self)

    def close(self) -> None:
        """End the watch. Collective."""
        _watchdog().retire(self)
        with Wait("end of a group"):
            self.comm.Barrier()  # until then others are answered
        _watchdog().remove(self)
        self.comm.Free()

    def retire(self) -> None:
        """Have no eye on others any more: they may end when they like."""
        self._is_closing = True
        self._forget_ping()

    def _forget_ping(self) -> None:
        if self._ping is not None:
            self._ping.cancel()
        self._ping = None

    # -- of the watchdog's thread --------------------------------------------------------------

    def read(self) -> None:
        """Take the messages that have arrived; tell who asks where this rank is."""
        status = MPI.Status()
        while self.can_talk and self.comm.Iprobe(status=status):
            source, tag = status.source, status.tag
            content = self.comm.recv(source=source, tag=tag)
            if tag == _ASK:
                if not self.asked_by:
                    _end_by_force_later()
                self.asked_by.add(source)
                self._send(own_state(), source, _ANSWER)
            elif tag == _ANSWER:
                self.answers[source] = content
            elif tag == _GOODBYE:
                self._has_left = True
            elif tag == _PING:
                self._send(None, source, _PONG)
            elif tag == _PONG:
                self._forget_ping()
            else:
                self._ends_at = min(self._ends_at, time.monotonic() + _ABORT_GRACE)

    def _send(self, content: object, peer: int, tag: int) -> None:
        with suppress(MPI.Exception):  # the peer may be gone
            self._sent.append(self.comm.isend(content, peer, tag))

    def say_goodbye(self) -> None:
        """Let the rank that watches this one know that it ends as it should."""
        if self.can_talk and self._before != self.rank:
            self._send(None, self._before, _GOODBYE)

    def say_ending(self) -> None:
        """Let all ranks know that the job is being ended, and why has been said; those near this one first."""
        own_space = self._pids[self.rank][0]
        others = [rank for rank in range(self.size) if rank != self.rank]
        for peer in sorted(others, key=lambda rank: self._pids[rank][0] != own_space):
            if self.can_talk:
                self._send(None, peer, _ENDING)

    def note_death(self) -> None:
        """The next rank's process is gone."""
        self.pidfd = None
        self._died_at = time.monotonic()

    def end_if_over(self) -> None:
        """End this process if another one has ended the job and the launcher does nothing.

        srun, once it has sent SIGTERM, takes no notice of MPI_Abort.
        """
        if time.monotonic() >= self._ends_at:
            launch.leave(1)

    def end_if_dead(self) -> None:
        """End the job if the next rank is gone, did not say goodbye, and the launcher does nothing."""
        if time.monotonic() < self._died_at + _DEATH_GRACE or self._has_left or not self.can_talk:
            return
        if self._is_closing or self._ends_at < math.inf:
            return  # that is why it is gone
        pid = self._pids[self._next][1]
        launch.end_job(
            [
                f"rank {self._next} (pid {pid}) has ended in the middle of the job, without a "
                "word: killed, out of memory, a crash or os._exit",
                f"this rank: {progress.step} steps done, {progress.phase}; ending the job",
            ],
            1,
        )

    def ask_far(self) -> None:
        """Ask the rank of the next node whether it is there; end the job if no answer comes in time.

        What happens then waits on a thread of its own: a message to a node that is gone may never return.
        """
        now = time.monotonic()
        if (
            self._far is None
            or self._is_closing
            or self._ping is not None
            or now < self._next_ping
            or not self.can_talk
        ):
            return
        self._next_ping = now + _PING_PERIOD
        self._ping = threading.Timer(_PING_TIME, self._end_as_far_is_silent)
        self._ping.daemon = True
        self._ping.start()
        self._send(None, self._far, _PING)

    def _end_as_far_is_silent(self) -> None:
        launch.end_job(
            [
                f"asked to stop by SIGTERM, and rank {self._far} does not answer: taken for "
                "dead, with other ranks of its node perhaps",
                f"this rank: {progress.step} steps done, {progress.phase}; ending the job",
            ],
            1,
        )

    def report_hang(self, wait: Wait, seconds: float) -> NoReturn:
        """Ask the others where they are, say so, and end the job; if several ask, the lowest reports."""
        for peer in range(self.size):
            if peer != self.rank:
                self._send(None, peer, _ASK)
        end = time.monotonic() + min(_ANSWER_TIME, seconds)
        while time.monotonic() < end and len(self.answers) < self.size - 1:
            time.sleep(_POLL / 20)
            self.read()
        if any(asker < self.rank for asker in self.asked_by):
            time.sleep(_LAST_RESORT)  # it ends the job
        waiting = Waiting(wait.what, wait.number, wait.members)
        states: dict[int, State | str] = {
            rank: self.answers.get(rank) or self._silence_of(rank) for rank in range(self.size)
        }
        states[self.rank] = own_state()
        launch.end_job(hang_report(waiting, seconds, states, self.size), 1)

    def _silence_of(self, rank: int) -> str:
        """Why a rank may not answer."""
        space, pid = self._pids[rank]
        if space != self._pids[self.rank][0]:
            return "does not answer: gone, stopped, or in a call that keeps Python's lock"
        state = "gone"
        with suppress(OSError), open(f"/proc/{pid}/stat") as stat:
            state = {"T": "stopped", "Z": "dead"}.get(
                stat.read().rpartition(")")[2].split()[0], "in a call that keeps Python's lock"
            )
        return f"does not answer: process {pid} is {state}"


class _Watchdog:
    """The thread, and what it looks at."""

    def __init__(self) -> None:
        self._allowed = seconds_allowed()
        self._watches: weakref.WeakSet[Watch] = weakref.WeakSet()
        self._lock = threading.Lock()  # held while the thread uses communicators
        self._is_ending = False
        self._alarm, self.bell = os.pipe()
        os.set_blocking(self.bell, False)
        self._thread = threading.Thread(target=self._run, name="zerompi-watchdog", daemon=True)
        self._thread.start()
        atexit.register(self._stop)
        launch.before_abort.append(self._say_ending)

    def add(self, watch: Watch) -> None:
        with self._lock:
            self._watches.add(watch)
        os.write(self.bell, b"\0")

    def retire(self, watch: Watch) -> None:
        with self._lock:
            watch.retire()

    def remove(self, watch: Watch) -> None:
        with self._lock:
            self._watches.discard(watch)

    def _stop(self) -> None:
        """Before MPI is finalised, after which no thread may call it."""
        if launch.is_alone():
            return  # or the child of a fork, where there is no such thread
        with self._lock:
            self._is_ending = True
        os.write(self.bell, b"\0")
        self._thread.join()
        for watch in list(self._watches):
            watch.retire()
            watch.say_goodbye()

    def _say_ending(self) -> None:
        for watch in list(self._watches):
            watch.say_ending()

    def _run(self) -> None:
        poll = min(_POLL, self._allowed / 4)
        while True:
            self._sleep(poll)
            with self._lock:
                if self._is_ending or MPI.Is_finalized():
                    return
                for watch in list(self._watches):
                    watch.read()
                    watch.end_if_over()
                    watch.end_if_dead()
                self._check_waits()

    def _sleep(self, seconds: float) -> None:
        """Until a neighbour dies or the bell rings, for some seconds at most."""
        with self._lock:
            eyes = {watch.pidfd: watch for watch in self._watches if watch.pidfd is not None}
        ready, _, _ = select.select([self._alarm, *eyes], [], [], seconds)
        for descriptor in ready:
            if descriptor == self._alarm:
                if signal.SIGTERM in os.read(self._alarm, 64):
                    progress.terminated_at = time.monotonic()
            else:
                eyes[descriptor].note_death()

    def _check_waits(self) -> None:
        found = longest_wait()
        if found is None or any(watch.asked_by for watch in self._watches):
            return  # or another rank reports already
        now = time.monotonic()
        stop = progress.terminated_at
        if stop is not None and now >= max(stop, found[0]) + _STOP_PATIENCE:
            for watch in list(self._watches):
                watch.ask_far()
        seconds = now - found[0]
        if seconds < self._allowed:
            return
        _end_by_force_later()
        able = [watch for watch in self._watches if watch.can_talk]
        if found[1].watch is not None:
            able = [watch for watch in able if watch is found[1].watch]
        if able:
            max(able, key=lambda watch: watch.size).report_hang(found[1], seconds)
        launch.end_job(_own_report(found[1], seconds), 1)


@cache
def _watchdog() -> _Watchdog:
    return _Watchdog()


def _own_report(wait: Wait, seconds: float) -> Sequence[str]:
    """What this rank knows where it cannot ask the others."""
    state = own_state()
    return [
        f"waited {seconds:.0f} s in vain: {wait.what}",
        f"{state.step} steps done, {state.phase}",
        *state.stack,
    ]


def _end_by_force_later() -> None:
    """The job ends soon; should that hang, too, this process ends without Python's or MPI's help."""
    with suppress(OSError, ValueError, AttributeError):  # standard error may be no file
        faulthandler.dump_traceback_later(_LAST_RESORT, exit=True)


@cache
def _namespace() -> object:
    """What processes have in common that know each other by number; nothing where that is unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as boot:
            return boot.read(), os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return os.urandom(16)


def _open_pidfd(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None where the system has none."""
    try:
        return os.pidfd_open(pid)
    except (OSError, AttributeError):
        return None


def _close(descriptor: int) -> None:
    with suppress(OSError):
        os.close(descriptor)
