"""Fences: ranks of one node wait for each other on counters in shared memory, asleep.

An MPI barrier polls: where ranks share cores it takes them from those that still compute. Here a
rank that waits sleeps in the kernel (futex(2)) until the rank it waits for has counted.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache

# Of each rank, one page: its counters, each in a cache line of its own, then two headers.
RANK_NBYTES = 4096
_LINE = 64
_ARRIVED, _FINISHED = 0, 1  # which line
_HEADERS = 2 * _LINE  # where two headers of a digest and flags stand, used by turns
_HEADER_WORDS = 2

_FUTEX_NUMBERS = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_WAKE_ALL = 0x7FFFFFFF
_MODULO = 1 << 32

_TICK = 0.005  # seconds after which a sleeping rank looks around
_POLL = 2e-4  # seconds between looks where there is no futex


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


@cache
def _futex() -> Callable[[int, int, int, object], int] | None:
    """futex(address, operation, value, timeout), or None where the system has none that we know."""
    number = _FUTEX_NUMBERS.get(platform.machine())
    syscall = getattr(ctypes.CDLL(None, use_errno=True), "syscall", None)
    if number is None or syscall is None or platform.system() != "Linux":
        return None
    syscall.restype = ctypes.c_long

    def call(address: int, operation: int, value: int, timeout: object) -> int:
        result: int = syscall(
            ctypes.c_long(number),
            ctypes.c_void_p(address),
            ctypes.c_int(operation),
            ctypes.c_uint32(value),
            timeout,
            None,
            ctypes.c_int(0),
        )
        return result

    return call


class Fence:
    """Counters of the ranks of one node: each writes its own and waits for the others'.

    All ranks pass the same sequence of fences, numbered from 1. *Arrived* at fence n: everything
    before it is done, and may be read by the others. *Finished* with fence n: nothing is read any
    more that fence n made readable. Both numbers of a rank only grow.

    Args:
        address: of `size` * RANK_NBYTES bytes of memory that the ranks share, zero at first.
        rank, size: this rank's position among them.
        synchronise: a full memory barrier between the ranks (MPI_Win_sync).
        progress: called now and then while a rank waits, so that messages to other nodes move on.
        asleep: entered while a rank sleeps.
        looks: how often a rank looks before it sleeps.
    """

    def __init__(
        self,
        address: int,
        rank: int,
        size: int,
        synchronise: Callable[[], None],
        progress: Callable[[], object],
        asleep: AbstractContextManager[object],
        looks: int = 0,
    ) -> None:
        self.rank, self.size = rank, size
        self.count = 0
        self._peers = [peer for peer in range(size) if peer != rank]
        self._address = address
        memory = (ctypes.c_char * (size * RANK_NBYTES)).from_address(address)
        self._words = memoryview(memory).cast("B").cast("I")
        self._longs = memoryview(memory).cast("B").cast("Q")
        self._synchronise = synchronise
        self._progress = progress
        self._asleep = asleep
        self._looks = looks

    # -- fences --------------------------------------------------------------------------------

    def arrive(self, digest: int = 0, flags: int = 0) -> int:
        """Arrive at the next fence with a header of two 64-bit numbers; return its number."""
        self.count += 1
        at = self._header(self.rank, self.count)
        self._longs[at], self._longs[at + 1] = digest, flags
        self._publish(_ARRIVED, self.count)
        return self.count

    def wait(self, number: int) -> None:
        """Wait until all ranks have arrived at fence `number`."""
        self._wait(_ARRIVED, number)

    def headers(self, number: int) -> list[tuple[int, int]]:
        """What each rank brought to fence `number`; after `wait`, before the next `arrive`."""
        starts = [self._header(peer, number) for peer in range(self.size)]
        return [(self._longs[at], self._longs[at + 1]) for at in starts]

    def cross(self) -> int:
        """Arrive at the next fence and wait for all; return its number."""
        number = self.arrive()
        self.wait(number)
        return number

    def finish(self, number: int) -> None:
        """Let the others know that this rank reads nothing more of fence `number`, or earlier."""
        self._publish(_FINISHED, number)

    def wait_finished(self, number: int) -> None:
        """Wait until all ranks have finished with fence `number`."""
        self._wait(_FINISHED, number)

    # -- counters ------------------------------------------------------------------------------

    def _header(self, rank: int, number: int) -> int:
        """Index of a header among 64-bit words. Two suffice: nobody is two fences ahead."""
        words_of_rank = rank * RANK_NBYTES // 8
        return words_of_rank + _HEADERS // 8 + (number % 2) * _HEADER_WORDS

    def _word(self, rank: int, line: int) -> int:
        return (rank * RANK_NBYTES + line * _LINE) // 4

    def _publish(self, line: int, number: int) -> None:
        self._synchronise()
        word = self._word(self.rank, line)
        self._words[word] = number % _MODULO
        futex = _futex()
        if futex is not None:
            futex(self._address + 4 * word, _FUTEX_WAKE, _WAKE_ALL, None)

    def _wait(self, line: int, number: int) -> None:
        for peer in self._peers:
            word = self._word(peer, line)
            looks = self._looks
            while 0 < (number - self._words[word]) % _MODULO < _MODULO // 2:
                if not looks:
                    self._sleep_until(word, number)
                    break
                looks -= 1
        self._synchronise()

    def _sleep_until(self, word: int, number: int) -> None:
        with self._asleep:
            while 0 < (number - (value := self._words[word])) % _MODULO < _MODULO // 2:
                self._sleep(word, value)

    def _sleep(self, word: int, value: int) -> None:
        """Sleep while the word has this value, for a tick at most."""
        futex = _futex()
        if futex is None:
            time.sleep(_POLL)
        else:
            timeout = ctypes.byref(_Timespec(0, int(_TICK * 1e9)))
            if futex(self._address + 4 * word, _FUTEX_WAIT, value, timeout) == 0:
                return
            if ctypes.get_errno() in (errno.EAGAIN, errno.EINTR):
                return
        self._progress()
