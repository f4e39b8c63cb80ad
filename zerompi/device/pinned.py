"""Pinned host memory, through which messages pass where MPI cannot read a device's."""

from __future__ import annotations

from typing import Any

from zerompi.device.copies import copy_bytes
from zerompi.device.driver import cupy
from zerompi.device.lanes import lane
from zerompi.memory import DeviceArray


class Slot:
    """Pinned host memory through which a piece of a message passes.

    Attributes:
        address: where it starts.
    """

    def __init__(self, nbytes: int) -> None:
        self._memory = cupy().cuda.alloc_pinned_memory(nbytes)
        self.address: int = self._memory.ptr
        self._copied: Any = None

    def fetch(self, source: DeviceArray) -> None:
        """Start to copy `source` here."""
        stream = lane().fetch
        copy_bytes(self.address, source.data_ptr(), source.nbytes, stream)
        self._copied = stream.record()

    def store(self, target: DeviceArray) -> None:
        """Start to copy what is here to `target`."""
        stream = lane().stream
        copy_bytes(target.data_ptr(), self.address, target.nbytes, stream)
        self._copied = stream.record()

    def wait(self) -> None:
        """Wait until the last copy is done: what came is complete, what went may be overwritten."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None


def begin_fetching() -> None:
    """Let what `Slot.fetch` copies be what the lane has computed."""
    own = lane()
    own.fetch.wait_event(own.stream.record())
