"""How buffers on devices get from rank to rank: chosen once for a group, the same on all ranks."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

from mpi4py import MPI

from zerompi import cuda_aware, device
from zerompi.collectives.node import DeviceNode
from zerompi.collectives.shared import STAGING_NBYTES
from zerompi.collectives.waiting import nothing_left, wait_some
from zerompi.errors import MismatchError, ZerompiError
from zerompi.launch import raised_by_all
from zerompi.memory import DeviceArray

if TYPE_CHECKING:
    from zerompi.collectives.group import Group, Messages

_SWITCH = "ZEROMPI_DEVICE_TRANSPORT"
_NAMES = ("cuda-aware", "staged", "ipc")
_SLOT_NBYTES = 1 << 20
_NUM_SLOTS = 8  # in each direction

_log = logging.getLogger("zerompi")


class Mail(Protocol):
    """Sends and receives messages between buffers on devices."""

    def start_exchange(self, sends: Messages, recvs: Messages, label: str) -> Callable[[], None]:
        """See `Group.start_exchange`."""


class Transport(NamedTuple):
    """What a group does with buffers on devices.

    Attributes:
        name: one of "cuda-aware", "staged" and "ipc".
        reason: why it was chosen.
        mail: for messages.
        node: with "ipc", the memory through which the ranks of this node read each other's blocks.
    """

    name: str
    reason: str
    mail: Mail
    node: DeviceNode | None


class CudaAware:
    """Hands the addresses on devices to an MPI library that can read them."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def start_exchange(self, sends: Messages, recvs: Messages, label: str) -> Callable[[], None]:
        """See `Group.start_exchange`."""
        device.ready()
        return self._group.start_messages(sends, recvs, label)


class Staged:
    """Sends messages through pinned memory on the host, piece by piece.

    While one piece travels, the next is copied from the device, and the last one to it. Sends and
    receives go on independently of each other, each in ring order with a bounded number of pieces
    under way: among all pieces of all ranks that have not arrived, the first one in that order is always
    under way on both sides.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._out: deque[device.Slot] = deque()
        self._in: deque[device.Slot] = deque()

    def start_exchange(self, sends: Messages, recvs: Messages, label: str) -> Callable[[], None]:
        """See `Group.start_exchange`; what it starts is over when it returns."""
        self._exchange(sends, recvs, label)
        return nothing_left

    def _exchange(self, sends: Messages, recvs: Messages, label: str) -> None:
        group = self._group
        if not self._out:
            self._out.extend(device.Slot(_SLOT_NBYTES) for _ in range(_NUM_SLOTS))
            self._in.extend(device.Slot(_SLOT_NBYTES) for _ in range(_NUM_SLOTS))
        device.begin_fetching()
        outgoing = _Pieces(group.ring_order(sends, is_send=True))
        incoming = _Pieces(group.ring_order(recvs, is_send=False))
        fetched: deque[tuple[int, DeviceArray, device.Slot]] = deque()
        requests: list[MPI.Request] = []
        under_way: list[tuple[device.Slot, DeviceArray | None]] = []
        while True:
            while self._in and (piece := incoming.next()):
                peer, target = piece
                slot = self._in.popleft()
                slot.wait()  # until what came last is on the device
                buffer = MPI.buffer.fromaddress(slot.address, target.nbytes)
                requests.append(group.comm.Irecv([buffer, MPI.BYTE], peer))
                under_way.append((slot, target))
            while self._out and (piece := outgoing.next()):
                peer, source = piece
                slot = self._out.popleft()
                slot.fetch(source)
                fetched.append((peer, source, slot))
            if fetched:
                peer, source, slot = fetched.popleft()
                slot.wait()
                buffer = MPI.buffer.fromaddress(slot.address, source.nbytes)
                requests.append(group.comm.Isend([buffer, MPI.BYTE], peer))
                under_way.append((slot, None))
                group.count_sent(label, peer, source.nbytes)
            elif not under_way:
                return
            for index in reversed(wait_some(requests, polls=group.polls, at_once=bool(fetched))):
                requests.pop(index)
                slot, arrived = under_way.pop(index)
                if arrived is None:
                    self._out.append(slot)
                else:
                    slot.store(arrived)
                    self._in.append(slot)


class _Pieces:
    """Messages cut into pieces that fit into a slot."""

    def __init__(self, messages: Messages) -> None:
        self._pieces = self._cut(messages)

    def next(self) -> tuple[int, DeviceArray] | None:
        """The next piece and its peer; None when there is none left."""
        return next(self._pieces, None)

    @staticmethod
    def _cut(messages: Messages) -> Iterator[tuple[int, DeviceArray]]:
        for peer, array in messages:
            assert isinstance(array, DeviceArray)
            step = _SLOT_NBYTES // array.element_size()
            for start in range(0, array.numel(), step):
                yield peer, array[start : start + step]


# -- choice ------------------------------------------------------------------------------------


def choose(group: Group) -> Transport:
    """The transport of a group. Collective.

    What the environment variable ZEROMPI_DEVICE_TRANSPORT says; else CUDA-aware MPI if every rank's
    library says that it is; else CUDA IPC inside nodes, if it works there; else the host.

    Raises:
        ZerompiError: what the variable asks for cannot be; on every rank.
        MismatchError: ranks have different values of the variable.
    """
    forced = os.environ.get(_SWITCH) or None
    aware, source = cuda_aware.detect()
    answers = group.comm.allgather((forced, aware, source))
    wishes = {wish for wish, _, _ in answers}
    if len(wishes) > 1:
        error = MismatchError(
            f"ZEROMPI_DEVICE_TRANSPORT: expected the same value on all ranks, got {wishes}"
        )
        raise raised_by_all(error, group.rank)
    if forced not in (None, *_NAMES):
        raise ZerompiError(
            f"ZEROMPI_DEVICE_TRANSPORT: expected one of {', '.join(_NAMES)}, got {forced!r}"
        )
    reason = f"{_SWITCH} says so"
    all_aware = all(aware for _, aware, _ in answers)
    if forced == "cuda-aware" or (forced is None and all_aware):
        transport = Transport("cuda-aware", reason if forced else source, CudaAware(group), None)
    else:
        if forced is None:
            reason = next(text for _, aware, text in answers if not aware)
        transport = _through_host(group, forced, reason, aware=all_aware)
    if group.comm.rank == 0:
        _say(transport.name, transport.reason)
    return transport


def _through_host(group: Group, forced: str | None, reason: str, *, aware: bool) -> Transport:
    """Messages through the host, or none inside nodes where that is asked for or possible."""
    mail: Mail = CudaAware(group) if aware and forced == "ipc" else Staged(group)
    if forced == "staged" or group.node is None:
        return Transport("staged" if mail.__class__ is Staged else "cuda-aware", reason, mail, None)
    problem = None
    node = None
    try:
        node = DeviceNode(group.node.comm, group.node.fence, STAGING_NBYTES)
    except RuntimeError as error:
        problem = str(error)
    problems = [text for text in group.comm.allgather(problem) if text is not None]
    if not problems:
        return Transport("ipc", reason, mail, node)
    if node is not None:
        node.close()
    if forced is not None:
        raise ZerompiError(
            f"ZEROMPI_DEVICE_TRANSPORT: expected one that works, got {forced!r}: {problems[0]}"
        )
    return Transport("staged", f"{reason}; CUDA IPC does not work: {problems[0]}", mail, None)


_said: set[tuple[str, str]] = set()


def _say(name: str, reason: str) -> None:
    if (name, reason) not in _said:
        _said.add((name, reason))
        _log.info("buffers on devices go by transport %s: %s", name, reason)
