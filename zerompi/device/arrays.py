"""CuPy arrays and tensors as device memory, device memory as either, and new tensors there."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zerompi.device.driver import activate, cupy, is_active, prepare_thread
from zerompi.device.lanes import lane
from zerompi.memory import HOST, DeviceArray, Flat, Reader, Space

_DEVICE_MEMORY = 2  # cudaMemoryTypeDevice, hipMemoryTypeDevice


def is_array(value: object) -> bool:
    """Whether `value` is a CuPy array; knows it without importing CuPy."""
    return type(value).__module__.partition(".")[0] == "cupy" and isinstance(value, cupy().ndarray)


def from_array(name: str, array: Any) -> DeviceArray:
    """The memory of a CuPy array."""
    if not array.flags.c_contiguous:
        raise ValueError(
            f"{name}: expected a C-contiguous array, got shape {array.shape} with strides "
            f"{array.strides}"
        )
    dtype = getattr(torch, _DTYPE_NAMES.get(array.dtype.name, array.dtype.name), None)
    if not isinstance(dtype, torch.dtype) or not array.dtype.isnative:
        raise TypeError(f"{name}: expected a dtype that torch has, got {array.dtype}")
    activate(array.device.id)
    return DeviceArray(array.data.ptr, array.size, dtype, array, Reader.CUPY)


_DTYPE_NAMES = {"bool_": "bool"}


def from_tensor(tensor: Tensor) -> DeviceArray | None:
    """The memory of a contiguous tensor if it is a device's, else None."""
    if tensor.is_cuda:
        activate(tensor.device.index)
        if lane().consumer is not None:
            tensor.record_stream(torch.cuda.current_stream())
        reader = Reader.TORCH
    elif holds(tensor):
        reader = Reader.HOST
    else:
        return None
    return DeviceArray(tensor.data_ptr(), tensor.numel(), tensor.dtype, tensor, reader)


def holds(tensor: Tensor) -> bool:
    """Whether a tensor's memory is a device's."""
    if tensor.is_cuda:
        return True
    if not is_active() or tensor.device.type != "cpu" or not tensor.numel():
        return False
    attributes = cupy().cuda.runtime.pointerGetAttributes(tensor.data_ptr())
    return bool(attributes.type == _DEVICE_MEMORY)


def space_of(tensor: Tensor) -> Space:
    """The space in which a tensor lies."""
    device = tensor.device if tensor.is_cuda else HOST.device
    return Space(device, is_device=holds(tensor))


def allocate(numel: int, dtype: torch.dtype, space: Space) -> Tensor:
    """A 1-D tensor in device memory, contents undefined."""
    if space.device.type != "cpu":
        tensor = torch.empty(numel, dtype=dtype, device=space.device)
        consumer = lane().consumer
        if consumer is not None:  # made by one thread, read by another
            tensor.record_stream(consumer)
        return tensor
    nbytes = numel * dtype.itemsize
    if not nbytes:
        return torch.empty(0, dtype=dtype)
    prepare_thread()
    owner = cupy().cuda.alloc(nbytes)
    memory = (ctypes.c_char * nbytes).from_address(owner.ptr)
    memory.owner = owner  # type: ignore[attr-defined]
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype)


def as_cupy(flat: Flat) -> Any:
    """A CuPy array over contiguous memory; a dtype that CuPy lacks as unsigned integers."""
    library = cupy()
    try:
        dtype = np.dtype(str(flat.dtype).removeprefix("torch."))
    except TypeError:
        dtype = np.dtype(f"uint{8 * flat.dtype.itemsize}")
    shape = tuple(flat.shape) if isinstance(flat, Tensor) else (flat.numel(),)
    if not flat.numel():
        return library.empty(shape, dtype)
    if isinstance(flat, Tensor) and not holds(flat):
        raise ValueError(f"tensor: expected one in device memory, got one on {flat.device}")
    memory = library.cuda.UnownedMemory(flat.data_ptr(), flat.nbytes, flat)
    return library.ndarray(shape, dtype, library.cuda.MemoryPointer(memory, 0))


class Lent:
    """Memory of a tensor of torch.cuda for somebody else: dead when nobody has it any more."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor  # keeps the memory alive
        self.__cuda_array_interface__ = {
            "shape": (tensor.nbytes,),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }

    def tensor(self) -> Tensor:
        """The same elements."""
        memory = torch.as_tensor(self, device=self._tensor.device)
        return memory.view(self._tensor.dtype)
