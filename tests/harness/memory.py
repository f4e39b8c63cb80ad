"""Kinds of memory that tests put their numbers in: the host's, and a device's where there is one.

ZEROMPI_TEST_MEMORY=device lets the whole tiers of collectives and of parity run in the memory of a
device that the host can address, as an emulated one's is: torch computes there on the host, and
zerompi has device buffers. Without it they run on the host.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zerompi import device
from zerompi.memory import HOST, DeviceArray, Space

# Device memory that the host addresses: what an emulated device, and some hardware, has.
ADDRESSABLE = Space(HOST.device, is_device=True)

WITHOUT_DEVICE = "needs CuPy and a device, perhaps an emulated one"
HAS_DEVICE = device.count() > 0
# Whether work on a stream runs only when somebody waits for it: an emulated device, deferred.
IS_DEFERRED = (
    hasattr(ctypes.CDLL(None), "cuemu_host_access") and os.environ.get("CUEMU_ASYNC") == "1"
)
ON_DEVICE = os.environ.get("ZEROMPI_TEST_MEMORY", "host") == "device"

_BLOCK_NBYTES = 1 << 20


def may_read_neighbours() -> bool:
    """Whether the environment lets the ranks of a node read each other's buffers without a message."""
    if ON_DEVICE and os.environ.get("ZEROMPI_DEVICE_TRANSPORT") != "ipc":
        return False
    return os.environ.get("ZEROMPI_SHARED_MEMORY") != "0"


def synchronise() -> None:
    """Wait for CuPy's current stream."""
    import cupy

    cupy.cuda.get_current_stream().synchronize()


@cache
def _take_few_blocks() -> None:
    """Let CuPy's pool cut what tests need from one block for each stream.

    An emulator protects block by block, and there would be hundreds. Where it protects nothing each array
    has pages of its own, so that a kernel that leaves them is noticed.
    """
    import cupy

    device.use(0)
    for stream in (cupy.cuda.Stream.null, device.lane().stream):
        with stream:
            cupy.cuda.alloc(_BLOCK_NBYTES)  # freed at once, and kept by the pool


@contextmanager
def host_may_touch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where an emulator protects device pages: open them, but not while a collective runs.

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
    _take_few_blocks()
    ordered = device.ordered

    @contextmanager
    def closed(arrays: Sequence[DeviceArray]) -> Iterator[None]:
        is_inner = device.lane().is_ordered
        if not is_inner:
            allow(0)
        try:
            with ordered(arrays):
                yield
        finally:
            if not is_inner:
                allow(1)

    monkeypatch.setattr(device, "ordered", closed)
    allow(1)
    try:
        yield
    finally:
        allow(0)


def move(model: nn.Module) -> None:
    """Put parameters, gradients and buffers that are on the host into device memory."""
    memory = DeviceMemory()
    for tensor in [*model.parameters(), *model.buffers()]:
        for each in (tensor, tensor.grad):
            if each is not None and each.device.type == "cpu" and not device.holds(each):
                each.data = memory.put_tensor(each.detach())
    synchronise()


def on_device(partition: Callable[..., Any]) -> Callable[..., Any]:
    """`zerompi.partition` of models whose parameters are moved to the device first."""

    @wraps(partition)
    def moved(model: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model, nn.Module):
            move(model)
        return partition(model, *args, **kwargs)

    return moved


class _Moved(torch.autograd.Function):
    """The values in device memory."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        moved = DeviceMemory().put_tensor(tensor.detach().resolve_conj().resolve_neg())
        synchronise()  # torch reads it, too
        return moved

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0]


def apply_on_device(apply: Callable[..., Any]) -> Callable[..., Any]:
    """`zerompi.autograd._apply`, through which all go, to tensors that are moved to the device first."""

    @wraps(apply)
    def moved(function: Any, operation: str, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        is_plain = isinstance(tensor, Tensor) and tensor.layout is torch.strided
        if is_plain and tensor.device.type == "cpu":
            tensor = _Moved.apply(tensor)
        return apply(function, operation, tensor, *args, **kwargs)

    return moved


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
UNDER_TEST: Memory = DeviceMemory() if ON_DEVICE else HostMemory()
