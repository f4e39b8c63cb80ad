"""Streams: each thread's lane, its order with the streams of others, work handed to another thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from zerompi.device.driver import activate, cupy, has_torch_cuda, is_active, prepare_thread
from zerompi.memory import DeviceArray, Reader


class _Lane(threading.local):
    """What one thread communicates with.

    Attributes:
        stream: on which it copies and adds.
        fetch: on which it copies what is going to be sent through the host.
        is_ordered: whether a collective runs.
        consumer: in a thread that works for another one, that one's stream of torch.cuda.
    """

    stream: Any = None
    fetch: Any = None
    is_ordered = False
    consumer: Any = None


_lanes = _Lane()


def lane() -> _Lane:
    """This thread's lane; it has streams from the first device buffer on."""
    if is_active() and _lanes.stream is None:
        prepare_thread()
        _lanes.stream = cupy().cuda.Stream(non_blocking=True)
        _lanes.fetch = cupy().cuda.Stream(non_blocking=True)
    return _lanes


@contextmanager
def ordered(arrays: Sequence[DeviceArray]) -> Iterator[None]:
    """Let what is done to the arrays inside be ordered with what others do before and after.

    The others are torch.cuda's current stream for its tensors, CuPy's for all else, and the host.
    Inside a context of this kind another one does nothing.
    """
    own = lane()
    if own.is_ordered:
        yield
        return
    readers = {array.reader for array in arrays}
    streams = []
    if readers - {Reader.TORCH}:
        streams.append(cupy().cuda.get_current_stream())
    if Reader.TORCH in readers:
        streams.append(_torchs_stream())
    for stream in streams:
        own.stream.wait_event(stream.record())
    own.is_ordered = True
    try:
        with own.stream:
            yield
    finally:
        own.is_ordered = False
        done = own.stream.record()
        for stream in streams:
            stream.wait_event(done)
        if Reader.HOST in readers:
            own.stream.synchronize()


@contextmanager
def beside(tensor: Tensor) -> Iterator[None]:
    """Launch kernels on the stream of those who compute with the tensor.

    Those are torch.cuda; or the host, which on return may read what the kernels have written.
    """
    if tensor.is_cuda:
        activate(tensor.device.index)
        with _torchs_stream():
            yield
        return
    with lane().stream as stream:
        yield
        stream.synchronize()


class _Foreign:
    """A stream that is not CuPy's own, as CuPy 14 takes it."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        """Version of the protocol, and the stream's address."""
        return 0, self._address


def _torchs_stream() -> Any:
    """torch.cuda's current stream, for CuPy."""
    address, cuda = torch.cuda.current_stream().cuda_stream, cupy().cuda
    if hasattr(cuda.Stream, "from_external"):
        return cuda.Stream.from_external(_Foreign(address))
    return cuda.ExternalStream(address)  # CuPy 13


def ready() -> None:
    """Wait until this thread's lane has done everything: its buffers may be read and written by MPI.

    The one place where a buffer becomes ready for MPI, or for another process.
    """
    lane().stream.synchronize()


def synchronise() -> None:
    """Wait for the current streams, CuPy's and, where it computes, torch.cuda's."""
    cupy().cuda.get_current_stream().synchronize()
    if has_torch_cuda():
        torch.cuda.current_stream().synchronize()


class Handover:
    """Work that one thread gives to another: made where it is given.

    What the giving thread's current streams, CuPy's and torch.cuda's, were given before is done first;
    `join` lets those of the thread that waits be behind the work.
    """

    def __init__(self) -> None:
        self._consumer = torch.cuda.current_stream() if has_torch_cuda() else None
        self._given = [stream.record() for stream in _current_streams()]
        self._done: Any = None

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The work, in the other thread: on its lane, which is the current stream there."""
        own = lane()
        for event in self._given:
            own.stream.wait_event(event)
        own.consumer = self._consumer
        try:
            with own.stream, _as_torchs(own.stream):
                yield
        finally:
            own.consumer = None
            self._done = own.stream.record()

    def join(self) -> None:
        """Let the current streams wait for the work, which has been given to the lane."""
        if self._done is not None:
            for stream in _current_streams():
                stream.wait_event(self._done)


def _current_streams() -> list[Any]:
    """Of this thread: CuPy's and, where it computes, torch.cuda's."""
    own = cupy().cuda.get_current_stream()
    return [own, _torchs_stream()] if has_torch_cuda() else [own]


def _as_torchs(stream: Any) -> AbstractContextManager[None]:
    """Let a stream of CuPy's be torch.cuda's current one, where that computes."""
    if not has_torch_cuda():
        return nullcontext()
    context: AbstractContextManager[None] = torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr))
    return context


def hand_over() -> Handover | None:
    """A `Handover` where there are device buffers, else None."""
    return Handover() if is_active() else None
