"""Kinds of memory that tests put their numbers in: the host's, and a device's where there is one."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor

from zerompi import device
from zerompi.collectives.node import DeviceNode
from zerompi.collectives.transport import Staged
from zerompi.memory import HOST, Space

# Device memory that the host addresses: what an emulated device, and some hardware, has.
ADDRESSABLE = Space(HOST.device, is_device=True)

WITHOUT_DEVICE = "needs CuPy and a device, perhaps an emulated one"
HAS_DEVICE = device.count() > 0


def synchronise() -> None:
    """Wait for CuPy's current stream."""
    import cupy

    cupy.cuda.get_current_stream().synchronize()


@contextmanager
def host_may_touch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where an emulator protects device pages: open them, but not while buffers are sent.

    One thread only then: the other one would compute while they are closed.
    """
    try:
        allow = ctypes.CDLL(None).cuemu_host_access
    except AttributeError:  # no emulator
        yield
        return
    if os.environ.get("CUEMU_PROTECT", "0") != "1":
        yield
        return
    monkeypatch.setenv("ZEROMPI_COMM_THREAD", "0")

    def closed(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any) -> Any:
            allow(0)
            try:
                return function(*args)
            finally:
                allow(1)

        return call

    monkeypatch.setattr(Staged, "exchange", closed(Staged.exchange))
    monkeypatch.setattr(DeviceNode, "cross", closed(DeviceNode.cross))
    allow(1)
    try:
        yield
    finally:
        allow(0)


class HostMemory:
    """Tensors as they are."""

    name = "host"

    def put(self, tensor: Tensor) -> Any:
        """The same values in this memory; what is a view of another tensor stays one."""
        return tensor

    def put_tensor(self, tensor: Tensor) -> Tensor:
        """The same, as a tensor over this memory."""
        return tensor

    def get(self, array: Any) -> Tensor:
        """The values."""
        tensor: Tensor = array
        return tensor


class DeviceMemory:
    """CuPy arrays, and tensors over device memory for dtypes that CuPy has not.

    What is put is copied there later: a stream that nobody waits for has not even begun.
    """

    name = "device"

    def put(self, tensor: Tensor) -> Any:
        """The same values in this memory."""
        target = self.put_tensor(tensor)
        array = device.as_cupy(target)
        return array if str(tensor.dtype) == f"torch.{array.dtype.name}" else target

    def put_tensor(self, tensor: Tensor) -> Tensor:
        """The same, as a tensor over this memory."""
        if not device.is_active():
            device.use(0)
        target = device.allocate(tensor.numel(), tensor.dtype, ADDRESSABLE).view(tensor.shape)
        if tensor.numel():
            values = tensor.contiguous().view(-1).view(torch.uint8).numpy()
            device.as_cupy(target).reshape(-1).view("u1").set(values)
        return target

    def get(self, array: Any) -> Tensor:
        """The values, on the host."""
        if not isinstance(array, Tensor):
            return torch.from_numpy(array.get())
        if not array.numel():
            return torch.empty(array.shape, dtype=array.dtype)
        values = device.as_cupy(array).reshape(-1).view("u1").get()
        return torch.from_numpy(values).view(array.dtype).view(array.shape)


Memory = HostMemory | DeviceMemory

each_memory = pytest.mark.parametrize(
    "memory",
    [
        pytest.param(HostMemory(), id="host"),
        pytest.param(
            DeviceMemory(),
            id="device",
            marks=pytest.mark.skipif(not HAS_DEVICE, reason=WITHOUT_DEVICE),
        ),
    ],
)
