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
    if array.device.type != "cpu":
        raise ValueError(f"{name}: expected a tensor on the host, got one on {array.device}")
    if array.layout is not torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got {array.layout}")
    if array.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor without requires_grad, got one with; detach it, or use "
            "zerompi.autograd for gradients"
        )
    if not array.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor, got shape {tuple(array.shape)} with strides "
            f"{array.stride()}"
        )
    return array.view(-1)


def _from_numpy(name: str, array: np.ndarray[Any, Any], writable: bool) -> Tensor:
    if not array.flags.c_contiguous:
        raise ValueError(
            f"{name}: expected a C-contiguous array, got shape {array.shape} with strides "
            f"{array.strides}"
        )
    if not array.flags.writeable:
        if writable:
            raise ValueError(f"{name}: expected a writable array, got a read-only one")
        array = array.view()
        # torch has no read-only tensors; what is sent is never written.
        array = np.frombuffer(memoryview(array), dtype=array.dtype).reshape(array.shape)
    try:
        return torch.from_numpy(array).view(-1)
    except TypeError as error:
        raise TypeError(f"{name}: expected a dtype that torch has, got {array.dtype}") from error


def host_bytes(tensor: Tensor) -> MPI.buffer:
    """The memory of a contiguous tensor on the host, for MPI; valid as long as the tensor is.

    Not `tensor.numpy()`, which would make the storage impossible to resize.
    """
    return MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes)
