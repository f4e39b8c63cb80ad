"""NumPy arrays and torch tensors as the flat torch tensors that collectives work on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor


def flat_tensor(name: str, array: Any, *, writable: bool = False) -> Tensor:
    """A 1-D tensor over the memory of `array`; nothing is copied.

    Args:
        name: of the argument, for messages.
        array: a C-contiguous NumPy array or a contiguous, dense torch tensor on the host.
        writable: whether the array will be written.

    Raises:
        TypeError: neither a NumPy array nor a torch tensor, or of a dtype that torch has not.
        ValueError: not contiguous, not on the host, read-only although it will be written, or part of an
            autograd graph.
    """
    if isinstance(array, np.ndarray):
        return _from_numpy(name, array, writable)
    if not isinstance(array, Tensor):
        raise TypeError(
            f"{name}: expected a NumPy array or a torch tensor, got {type(array).__name__}"
        )
    require_host_tensor(name, array)
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
    return array.view(-1)


def require_host_tensor(name: str, tensor: Any) -> None:
    """Refuse what is no dense torch tensor on the host.

    Raises:
        TypeError: no tensor, or a quantized one.
        ValueError: on another device, or sparse.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch tensor, got {type(tensor).__name__}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name}: expected a tensor on the host, got one on {tensor.device}")
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


def copy_values(target: Tensor, source: Tensor) -> None:
    """Copy between contiguous 1-D tensors of one dtype; torch itself does not copy every dtype."""
    target.view(torch.uint8).copy_(source.view(torch.uint8))


def host_bytes(tensor: Tensor) -> MPI.buffer:
    """The memory of a contiguous tensor on the host, for MPI; valid as long as the tensor is.

    Not `tensor.numpy()`, which would make the storage impossible to resize.
    """
    return MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes)
