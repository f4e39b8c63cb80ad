"""What this process is in: its step and phase, what its threads wait for, and where they stand.

Whoever waits for other ranks says so in a table of the process while it waits. The watchdog reads
the table, and asks other ranks for theirs, when a wait takes too long.
"""

from __future__ import annotations

import os
import socket
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from types import FrameType
from typing import NamedTuple

_MAX_FRAMES = 16  # of a stack, the innermost
_MACHINERY = ("torch/nn/modules/module.py", "torch/nn/modules/container.py", "/threading.py")
_WAITING = ("zerompi/collectives/fence.py", "zerompi/collectives/waiting.py")
_PACKAGE = os.path.dirname(__file__) + os.sep
# What calls the rest as users' programs do.
_PROGRAMS = tuple(_PACKAGE + name for name in ("train", "bench", "cli"))
_LIBRARY = sysconfig.get_path("stdlib") + os.sep
_MAX_OWN_FRAMES = 3  # of the program itself, the innermost
COMM_THREAD = "zerompi-comm"  # its name
_MAX_SHOWN = 16  # groups of ranks in a report


class _Progress:
    """How far this process has come; written without a lock, for people to read.

    Attributes:
        step: calls of `optimizer.step()` that are complete, of the partition that stepped last.
        phase: what began last.
        terminated_at: when SIGTERM came as a request to stop, by the monotonic clock; None if it did not.
    """

    terminated_at: float | None = None
    step = 0
    phase = "before the first forward"


progress = _Progress()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """The phase of this process is `name` while the context lasts; also a decorator."""
    before, progress.phase = progress.phase, name
    try:
        yield
    finally:
        progress.phase = before


class _Idle:
    """Whether the main thread waits for another thread of this process."""

    is_main_thread_waiting = False


_idle = _Idle()


@contextmanager
def idle() -> Iterator[None]:
    """While the context lasts the calling thread waits for another one of this process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _idle.is_main_thread_waiting = True
    try:
        yield
    finally:
        _idle.is_main_thread_waiting = False


def computes_beside() -> bool:
    """Whether the main thread computes beside the calling one, as far as is known."""
    is_main = threading.current_thread() is threading.main_thread()
    return not (is_main or _idle.is_main_thread_waiting)


class Wait:
    """A context around each call that waits for other ranks; not nested in one thread.

    Attributes:
        what: what is waited for, for people; ranks that wait for the same have the same text.
        number: tells waits of one text and one group apart.
        members: the ranks that take part, as `watch` numbers them; None is all.
        watch: the `Watch` that can ask them; None if it is not known.
    """

    __slots__ = ("members", "number", "watch", "what")

    def __init__(
        self, what: str, members: tuple[int, ...] | None = None, watch: object | None = None
    ) -> None:
        self.what = what
        self.number = 0
        self.members = members
        self.watch = watch

    def __enter__(self) -> None:
        _since[threading.get_ident()] = (time.monotonic(), self)

    def __exit__(self, *exception: object) -> None:
        _since.pop(threading.get_ident(), None)


_since: dict[int, tuple[float, Wait]] = {}  # thread -> when it began to wait, and for what


def longest_wait() -> tuple[float, Wait] | None:
    """Since when this process has waited longest, by the monotonic clock, and for what."""
    return min(list(_since.values()), key=lambda entry: entry[0], default=None)


class Waiting(NamedTuple):
    """A wait as others see it."""

    what: str
    number: int
    members: tuple[int, ...] | None


class State(NamedTuple):
    """What a rank tells of itself.

    Attributes:
        host, pid: the process.
        step, phase: see `progress`.
        waits: what its threads wait for.
        stack: lines of text, of the main thread, the communication thread and those that wait.
    """

    host: str
    pid: int
    step: int
    phase: str
    waits: tuple[Waiting, ...]
    stack: tuple[str, ...]


def own_state() -> State:
    """The state of this process now."""
    waiting = dict(_since)
    waits = tuple(Waiting(w.what, w.number, w.members) for _, w in waiting.values())
    shown = {threading.main_thread().ident, *waiting}
    frames = sys._current_frames()
    stack: list[str] = []
    for thread in threading.enumerate():
        if thread.ident in frames and (thread.ident in shown or thread.name == COMM_THREAD):
            stack += [f"{thread.name}:", *_stack_lines(frames[thread.ident])]
    return State(
        socket.gethostname(), os.getpid(), progress.step, progress.phase, waits, tuple(stack)
    )


def _stack_lines(frame: FrameType) -> list[str]:
    """One line per frame, outermost first; without those that are in every stack."""
    entries = []
    for entry in traceback.extract_stack(frame):
        if not entry.filename.endswith(_MACHINERY):
            entries.append(entry)
            if entry.filename.endswith(_WAITING):
                break  # how we wait, or when we look up, is of no interest
    return [f"  {_line(entry)}" for entry in entries[-_MAX_FRAMES:]]


def _line(entry: traceback.FrameSummary) -> str:
    name = entry.filename.rpartition("/site-packages/")[2]
    return f"{name}:{entry.lineno} in {entry.name}: {entry.line}"


def own_place() -> tuple[str, ...]:
    """Where the program is that calls zerompi: lines of its stack, outermost first; none at its end.

    That of the main thread, if this one is not the program's.
    """
    main = sys._current_frames().get(threading.main_thread().ident or 0)
    for frame in (sys._getframe(), main):
        entries = [e for e in traceback.extract_stack(frame) if _is_of_program(e.filename)]
        if entries:
            return tuple(_line(entry) for entry in entries[-_MAX_OWN_FRAMES:])
    return ()


def _is_of_program(filename: str) -> bool:
    """Whether a file is neither zerompi's, nor torch's, nor Python's own."""
    if filename.startswith(_PACKAGE):
        return filename.startswith(_PROGRAMS)
    for installed in ("/site-packages/", "/dist-packages/"):
        if installed in filename:
            return f"{installed}torch/" not in filename
    return not filename.startswith((_LIBRARY, "<frozen "))


def hang_report(
    wait: Waiting, seconds: float, states: Mapping[int, State | str], size: int
) -> list[str]:
    """Lines that name who waits for whom; ranks at one place are shown once, those missing first.

    Args:
        wait: what has not ended.
        seconds: how long it has been waited for.
        states: of each rank that takes part its state, or why there is none.
        size: number of all ranks.
    """
    members = range(size) if wait.members is None else wait.members
    entries = sorted((_describe(wait, states[rank]), rank) for rank in members)
    groups = [
        (text, [rank for _, rank in entries])
        for text, entries in groupby(entries, key=lambda entry: entry[0])
    ]
    lines = [f"waited {seconds:.0f} s in vain: {wait.what}"]
    if all(text[0] == _IN_IT for text, _ in groups):
        lines.append("every rank waits for it: what they send each other does not arrive")
    for (_, *text), ranks in groups[:_MAX_SHOWN]:
        lines.append(f"rank{'s' * (len(ranks) > 1)} {listed(ranks)}: {text[0]}")
        lines += [f"    {line}" for line in text[1:]]
    if len(groups) > _MAX_SHOWN:
        lines.append(f"and {len(groups) - _MAX_SHOWN} other places")
    return lines


_MISSING, _PAST_IT, _IN_IT = "0", "1", "2"  # in this order in a report


def _describe(wait: Waiting, state: State | str) -> tuple[str, ...]:
    """A key to sort by, where the rank is, and the lines of its stack."""
    if isinstance(state, str):
        return _MISSING, f"missing, and {state}"
    position = f"{state.step} steps done, {state.phase}"
    if wait in state.waits:
        return _IN_IT, f"waiting for it; {position}", *state.stack
    others = [other.what for other in state.waits]
    doing = f"waiting for: {'; '.join(others)}" if others else "waiting for no other rank"
    later = any(o.members == wait.members and o.number > wait.number for o in state.waits)
    key, verb = (_PAST_IT, "past it") if later else (_MISSING, "missing")
    return key, f"{verb}; {position}; {doing}; pid {state.pid} on {state.host}", *state.stack


def listed(ranks: Sequence[int]) -> str:
    """Rank numbers as a text, the first eight of them."""
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return ", ".join(str(rank) for rank in ranks[:8]) + more
