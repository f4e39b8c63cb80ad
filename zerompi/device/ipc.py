"""Device memory that the processes of a node map from each other (CUDA IPC)."""

from __future__ import annotations

import torch

from zerompi.device.driver import cupy, prepare_thread
from zerompi.memory import DeviceArray, Reader


class Exported:
    """Device memory that other processes of this node can map. Contents undefined."""

    def __init__(self, nbytes: int) -> None:
        prepare_thread()
        # Not of a pool, whose memory has no handle of its own.
        self._memory = cupy().cuda.Memory(nbytes)
        self.handle: bytes = cupy().cuda.runtime.ipcGetMemHandle(self._memory.ptr)
        self.array = DeviceArray(self._memory.ptr, nbytes, torch.uint8, self._memory, Reader.CUPY)


class Mapped:
    """Another process's exported memory."""

    def __init__(self, handle: bytes, nbytes: int) -> None:
        self._address = cupy().cuda.runtime.ipcOpenMemHandle(handle)
        self.array = DeviceArray(self._address, nbytes, torch.uint8, self, Reader.CUPY)

    def close(self) -> None:
        """Unmap it."""
        cupy().cuda.runtime.ipcCloseMemHandle(self._address)
