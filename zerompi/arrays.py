"""Arrays and tensors of all kinds as the flat memory that collectives work on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from zerompi import device
from zerompi.memory import DeviceArray, Flat


def flat_tensor(name: str, array: Any, *, writable: bool = False) -> Flat:
    """The memory of `array`, flat: a 1-D tensor on the host, or memory of a device. Nothing is copied.

    Args:
        name: of the argument, for messages.
        array: a C-contiguous NumPy or CuPy array, or a contiguous, dense torch tensor on the host or
            of torch.cuda.
        writable: whether the array will be written.

    Raises:
        TypeError: no array or tensor, or of a dtype that torch has not.
        ValueError: not contiguous, on another device, read-only although it will be written, or part of
            an autograd graph.
    """
    if isinstance(array, np.ndarray):
        return _from_numpy(name, array, writable)
    if not isinstance(array, Tensor):
        if device.is_array(array):
            return device.from_array(name, array)
        raise TypeError(
            f"{name}: expected a NumPy or CuPy array or a torch tensor, got {type(array).__name__}"
        )
    require_dense_tensor(name, array)
    if array.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor without requires_grad, got one with; detach it, or use "
            "zerompi.autograd for gradients"
        )
    if array.is_conj() or array.is_neg():
        raise ValueError(
            f"{name}: expected values as they are in memory, got a lazy conjugate or negative; "
            "call resolve_conj() or resolve_neg()"
        )
    if not array.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor, got shape {tuple(array.shape)} with strides "
            f"{array.stride()}"
        )
    return on_device(array.view(-1))


def on_device(flat: Flat) -> Flat:
    """Memory of a device as such; what is on the host as it is."""
    if isinstance(flat, Tensor) and (device.is_active() or flat.is_cuda):
        return device.from_tensor(flat) or flat
    return flat


def require_dense_tensor(name: str, tensor: Any) -> None:
    """Refuse what is no dense torch tensor on the host or of torch.cuda.

    Raises:
        TypeError: no tensor, or a quantized one.
        ValueError: on another device, or sparse.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch tensor, got {type(tensor).__name__}")
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name}: expected a tensor on cpu or cuda, got one on {tensor.device}")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got {tensor.layout}")
    if tensor.is_quantized:
        raise TypeError(f"{name}: expected a plain dtype, got {tensor.dtype}; send int_repr()")


def _from_numpy(name: str, array: np.ndarray[Any, Any], writable: bool) -> Tensor:
    if not array.flags.c_contiguous:
        raise ValueError(
            f"{name}: expected a C-contiguous array, got shape {array.shape} with strides "
            f"{array.strides}"
        )
    if not array.flags.writeable:
        if writable:
            raise ValueError(f"{name}: expected a writable array, got a read-only one")
        array = np.asarray(_Lent(array))
    if array.dtype.kind in "iu" and array.dtype.isnative:
        # torch knows one of C's integer types of a size (long), not the others (long long).
        array = array.view(np.dtype(f"{array.dtype.kind}{array.dtype.itemsize}"))
    try:
        return torch.from_numpy(array).view(-1)
    except TypeError as error:
        raise TypeError(f"{name}: expected a dtype that torch has, got {array.dtype}") from error


class _Lent:
    """A read-only array's memory as if it were writable.

    torch has no read-only tensors and warns where it makes a writable one of a read-only array;
    what is sent is never written.
    """

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array  # keeps the memory alive
        pointer = array.__array_interface__["data"][0]
        self.__array_interface__ = {**array.__array_interface__, "data": (pointer, False)}


def copy_values(target: Flat, source: Flat) -> None:
    """Copy between contiguous 1-D memory of one dtype and kind; torch itself does not copy every dtype."""
    if isinstance(target, Tensor) and isinstance(source, Tensor):
        target.view(torch.uint8).copy_(source.view(torch.uint8))
    else:
        assert isinstance(target, DeviceArray)
        assert isinstance(source, DeviceArray)
        device.copy(target, source)


def empty(like: Flat, numel: int, dtype: torch.dtype) -> Flat:
    """New memory of the same kind, contents undefined."""
    if isinstance(like, Tensor):
        return torch.empty(numel, dtype=dtype)
    return device.empty(like, numel, dtype)


def empty_like(flat: Flat) -> Flat:
    """New memory of the same size, dtype and kind, contents undefined."""
    return empty(flat, flat.numel(), flat.dtype)


def host_bytes(tensor: Tensor) -> MPI.buffer:
    """The memory of a contiguous tensor on the host, for MPI; valid as long as the tensor is.

    Not `tensor.numpy()`, which would make the storage impossible to resize.
    """
    return MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes)


def as_numpy(tensor: Tensor) -> Any:
    """A NumPy array over contiguous host memory, without keeping it alive or from being resized.

    Of float32, float64, float16 or uint8; bfloat16, which NumPy has not, as uint16.
    """
    name = str(tensor.dtype).removeprefix("torch.").replace("bfloat16", "uint16")
    return np.frombuffer(host_bytes(tensor).cast("B"), dtype=name)
