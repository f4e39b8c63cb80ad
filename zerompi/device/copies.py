"""Copies on this thread's lane, and new memory for them: what a collective does inside `ordered`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zerompi.device.driver import cupy
from zerompi.device.lanes import lane
from zerompi.memory import DeviceArray

_COPY = 4  # cudaMemcpyDefault: the addresses tell the direction


def empty(like: DeviceArray, numel: int, dtype: torch.dtype) -> DeviceArray:
    """New memory, for this thread's lane."""
    memory = cupy().cuda.alloc(numel * dtype.itemsize)
    return DeviceArray(memory.ptr, numel, dtype, memory, like.reader)


def copy(target: DeviceArray, source: DeviceArray) -> None:
    """Copy bytes."""
    if source.nbytes:
        copy_bytes(target.data_ptr(), source.data_ptr(), source.nbytes, lane().stream)


def copy_bytes(target: int, source: int, nbytes: int, stream: Any) -> None:
    """Copy between addresses on devices or the host, on a stream of CuPy's."""
    cupy().cuda.runtime.memcpyAsync(target, source, nbytes, _COPY, stream.ptr)


def to_host(array: DeviceArray) -> Tensor:
    """The values in a new tensor on the host; it is not pinned, so the copy is done on return."""
    tensor = torch.empty(array.numel(), dtype=array.dtype)
    copy_bytes(tensor.data_ptr(), array.data_ptr(), array.nbytes, lane().stream)
    return tensor


def from_host(target: DeviceArray, tensor: Tensor) -> None:
    """Copy the values of a contiguous tensor that is not pinned: they have been read on return."""
    copy_bytes(target.data_ptr(), tensor.data_ptr(), target.nbytes, lane().stream)
