"""Memory of a device, and its streams: the one module that knows CuPy.

Nothing here imports CuPy, or starts CUDA, before there is a device buffer: a CuPy array, a tensor of
torch.cuda, or `use`. Device memory that the host can address (Grace Hopper, MI300A, an emulated
device) may also have an ordinary CPU tensor over it; from `use` on such tensors are recognised.

Each thread that communicates has a *lane*: a stream of its own on which it copies and adds, never
the default stream. A collective runs *ordered*: its lane waits for the streams of those who have
filled the buffers, and these wait for the lane. Where the host reads the buffers, it waits itself.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zerompi.errors import ZerompiError
from zerompi.kernels.adamw import Hyperparameters, Shard, launch_adamw
from zerompi.kernels.compiler import THREADS, launch
from zerompi.kernels.norm import launch_sum_of_squares
from zerompi.kernels.summation import SUM_KERNELS, SUM_SOURCE
from zerompi.memory import HOST, DeviceArray, Flat, Reader, Space

_DEVICE_MEMORY = 2  # cudaMemoryTypeDevice, hipMemoryTypeDevice
_COPY = 4  # cudaMemcpyDefault: the addresses tell the direction

_is_active = False
_number: int | None = None  # of the device of this process; others' threads have to be told


# -- which device ------------------------------------------------------------------------------


@cache
def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise ZerompiError(
            "buffers on a device need CuPy: pip install 'zerompi[cuda12]' or 'zerompi[cuda13]', or "
            "CuPy for ROCm"
        ) from error
    return cupy


def is_installed() -> bool:
    """Whether CuPy is installed; does not import it."""
    return find_spec("cupy") is not None


def count() -> int:
    """How many devices this process sees; 0 without CuPy or a driver. Starts no device."""
    if not is_installed():
        return 0
    try:
        return int(_cupy().cuda.runtime.getDeviceCount())
    except Exception:  # CuPy's own, of a missing driver or library: it says "none"
        return 0


def name(number: int) -> str:
    """What the driver calls a device."""
    properties = _cupy().cuda.runtime.getDeviceProperties(number)
    return str(properties["name"].decode())


def identity(number: int) -> str:
    """What tells a device from all others of the machine, whatever its number is here."""
    return bytes(_cupy().cuda.runtime.getDeviceProperties(number)["uuid"]).hex()


def use(number: int) -> None:
    """Make a device that of this process, for CuPy and, where it has it, torch.cuda.

    From now on CPU tensors over device memory are recognised, and CuPy takes memory from
    torch.cuda's allocator, so that two pools do not hold on to the same memory.
    """
    _cupy().cuda.Device(number).use()
    if _has_torch_cuda():
        torch.cuda.set_device(number)
    _activate(number)


def is_active() -> bool:
    """Whether this process has had device buffers."""
    return _is_active


def _activate(number: int) -> None:
    global _is_active, _number
    if not _is_active:
        if _has_torch_cuda():
            _share_allocator()
        _is_active = True
    _number = number


@cache
def _has_torch_cuda() -> bool:
    return torch.cuda.is_available()


def _share_allocator() -> None:
    """Let CuPy allocate what torch's caching allocator has."""
    cupy = _cupy()

    def allocate(nbytes: int, number: int) -> int:
        stream = cupy.cuda.get_current_stream(number).ptr
        return int(torch.cuda.caching_allocator_alloc(nbytes, number, stream))

    def free(address: int, number: int) -> None:
        torch.cuda.caching_allocator_delete(address)

    cupy.cuda.set_allocator(cupy.cuda.PythonFunctionAllocator(allocate, free).malloc)


# -- arrays and tensors ------------------------------------------------------------------------


def is_array(value: object) -> bool:
    """Whether `value` is a CuPy array; knows it without importing CuPy."""
    return type(value).__module__.partition(".")[0] == "cupy" and isinstance(value, _cupy().ndarray)


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
    _activate(array.device.id)
    return DeviceArray(array.data.ptr, array.size, dtype, array, Reader.CUPY)


_DTYPE_NAMES = {"bool_": "bool"}


def from_tensor(tensor: Tensor) -> DeviceArray | None:
    """The memory of a contiguous tensor if it is a device's, else None."""
    if tensor.is_cuda:
        _activate(tensor.device.index)
        if _lane().consumer is not None:
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
    if not _is_active or tensor.device.type != "cpu" or not tensor.numel():
        return False
    attributes = _cupy().cuda.runtime.pointerGetAttributes(tensor.data_ptr())
    return bool(attributes.type == _DEVICE_MEMORY)


def space_of(tensor: Tensor) -> Space:
    """The space in which a tensor lies."""
    device = tensor.device if tensor.is_cuda else HOST.device
    return Space(device, is_device=holds(tensor))


def allocate(numel: int, dtype: torch.dtype, space: Space) -> Tensor:
    """A 1-D tensor in device memory, contents undefined."""
    if space.device.type != "cpu":
        tensor = torch.empty(numel, dtype=dtype, device=space.device)
        consumer = _lane().consumer
        if consumer is not None:  # made by one thread, read by another
            tensor.record_stream(consumer)
        return tensor
    nbytes = numel * dtype.itemsize
    if not nbytes:
        return torch.empty(0, dtype=dtype)
    _prepare_thread()
    owner = _cupy().cuda.alloc(nbytes)
    memory = (ctypes.c_char * nbytes).from_address(owner.ptr)
    memory.owner = owner  # type: ignore[attr-defined]
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype)


def as_cupy(flat: Flat) -> Any:
    """A CuPy array over contiguous memory; a dtype that CuPy lacks as unsigned integers."""
    cupy = _cupy()
    try:
        dtype = np.dtype(str(flat.dtype).removeprefix("torch."))
    except TypeError:
        dtype = np.dtype(f"uint{8 * flat.dtype.itemsize}")
    shape = tuple(flat.shape) if isinstance(flat, Tensor) else (flat.numel(),)
    if not flat.numel():
        return cupy.empty(shape, dtype)
    if isinstance(flat, Tensor) and not holds(flat):
        raise ValueError(f"tensor: expected one in device memory, got one on {flat.device}")
    memory = cupy.cuda.UnownedMemory(flat.data_ptr(), flat.nbytes, flat)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


def as_torch(array: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of torch.cuda over the memory of a CuPy array (DLPack), perhaps of another dtype."""
    tensor: Tensor = torch.utils.dlpack.from_dlpack(array)
    return tensor if dtype is None else tensor.view(dtype)


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


# -- lanes -------------------------------------------------------------------------------------


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


def _lane() -> _Lane:
    """This thread's lane."""
    if _is_active and _lanes.stream is None:
        _prepare_thread()
        cupy = _cupy()
        _lanes.stream = cupy.cuda.Stream(non_blocking=True)
        _lanes.fetch = cupy.cuda.Stream(non_blocking=True)
    return _lanes


def _prepare_thread() -> None:
    """Give a new thread the device of this process; CUDA would give it the first."""
    if _number is not None:
        _cupy().cuda.Device(_number).use()


@contextmanager
def ordered(arrays: Sequence[DeviceArray]) -> Iterator[None]:
    """Let what is done to the arrays inside be ordered with what others do before and after.

    Inside a context of this kind another one does nothing.
    """
    lane = _lane()
    if lane.is_ordered:
        yield
        return
    readers = {array.reader for array in arrays}
    streams = [_cupy().cuda.get_current_stream()]
    if Reader.TORCH in readers:
        streams.append(_cupy().cuda.ExternalStream(torch.cuda.current_stream().cuda_stream))
    for stream in streams:
        lane.stream.wait_event(stream.record())
    lane.is_ordered = True
    try:
        with lane.stream:
            yield
    finally:
        lane.is_ordered = False
        done = lane.stream.record()
        for stream in streams:
            stream.wait_event(done)
        if Reader.HOST in readers:
            lane.stream.synchronize()


def ready() -> None:
    """Wait until this thread's lane has done everything: its buffers may be read and written by MPI.

    The one place where a buffer becomes ready for MPI, or for another process.
    """
    _lane().stream.synchronize()


def synchronise() -> None:
    """Wait for CuPy's current stream."""
    _cupy().cuda.get_current_stream().synchronize()


class Handover:
    """Work for torch.cuda that one thread gives to another: made where it is given.

    What the giving thread's stream was given before is done first; `join` lets the stream of the
    thread that waits be behind the work.
    """

    def __init__(self) -> None:
        self._consumer = torch.cuda.current_stream()
        self._given = self._consumer.record_event()
        self._done: Any = None

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The work, in the other thread: on its lane."""
        lane = _lane()
        stream = torch.cuda.ExternalStream(lane.stream.ptr)
        stream.wait_event(self._given)
        lane.consumer = self._consumer
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            lane.consumer = None
            self._done = stream.record_event()

    def join(self) -> None:
        """Let the current stream wait for the work, which has been given to the lane."""
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)


def hand_over() -> Handover | None:
    """A `Handover` where torch.cuda computes, else None: the host waits for each collective."""
    return Handover() if _is_active and _has_torch_cuda() else None


# -- inside an ordered context -----------------------------------------------------------------


def empty(like: DeviceArray, numel: int, dtype: torch.dtype) -> DeviceArray:
    """New memory, for this thread's lane."""
    memory = _cupy().cuda.alloc(numel * dtype.itemsize)
    return DeviceArray(memory.ptr, numel, dtype, memory, like.reader)


def copy(target: DeviceArray, source: DeviceArray) -> None:
    """Copy bytes."""
    if source.nbytes:
        _copy(target.data_ptr(), source.data_ptr(), source.nbytes, _lane().stream)


def _copy(target: int, source: int, nbytes: int, stream: Any) -> None:
    _cupy().cuda.runtime.memcpyAsync(target, source, nbytes, _COPY, stream.ptr)


def to_host(array: DeviceArray) -> Tensor:
    """The values in a new tensor on the host; it is not pinned, so the copy is done on return."""
    tensor = torch.empty(array.numel(), dtype=array.dtype)
    _copy(tensor.data_ptr(), array.data_ptr(), array.nbytes, _lane().stream)
    return tensor


def from_host(target: DeviceArray, tensor: Tensor) -> None:
    """Copy the values of a contiguous tensor that is not pinned: they have been read on return."""
    _copy(target.data_ptr(), tensor.data_ptr(), target.nbytes, _lane().stream)


def sum_in_order(summands: Sequence[DeviceArray], out: DeviceArray, scale: float) -> bool:
    """`out` = `scale` times the sum, first to last; False, and nothing done, if there is no kernel."""
    kernel = SUM_KERNELS.get(out.dtype)
    if kernel is None:
        return False
    addresses = np.array([summand.data_ptr() for summand in summands], dtype=np.uint64)
    table = _cupy().asarray(addresses)
    launch(
        SUM_SOURCE,
        kernel,
        -(-out.numel() // THREADS),
        table,
        np.int32(len(summands)),
        np.uint64(out.data_ptr()),
        np.int64(out.numel()),
        np.float64(scale),
    )
    return True


@contextmanager
def _beside(tensor: Tensor) -> Iterator[None]:
    """Launch kernels on the stream of those who compute with the tensor.

    Those are torch.cuda; or the host, which on return may read what the kernels have written.
    """
    if tensor.is_cuda:
        _activate(tensor.device.index)
        with _cupy().cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            yield
        return
    with _lane().stream as stream:
        yield
        stream.synchronize()


def sums_of_squares(tensors: Sequence[Tensor]) -> list[float]:
    """The sum of squares of each tensor; the host waits once, for all.

    Args:
        tensors: 1-D, in device memory, float32, float16 or bfloat16; at least one.
    """
    with _beside(tensors[0]):
        sums = [launch_sum_of_squares(as_cupy(tensor)) for tensor in tensors]
        numbers: list[float] = _cupy().concatenate(sums).get().tolist()
    return numbers


def step_adamw(tensors: tuple[Tensor, ...], hyper: Hyperparameters, step: int) -> None:
    """A step of AdamW on 1-D float32 tensors in device memory, as `kernels.adamw.Shard` has them."""
    with _beside(tensors[0]):
        launch_adamw(Shard(*map(as_cupy, tensors)), hyper, step)


# -- memory for transports ---------------------------------------------------------------------


class Slot:
    """Pinned host memory through which a piece of a message passes.

    Attributes:
        address: where it starts.
    """

    def __init__(self, nbytes: int) -> None:
        self._memory = _cupy().cuda.alloc_pinned_memory(nbytes)
        self.address: int = self._memory.ptr
        self._copied: Any = None

    def fetch(self, source: DeviceArray) -> None:
        """Start to copy `source` here."""
        lane = _lane()
        _copy(self.address, source.data_ptr(), source.nbytes, lane.fetch)
        self._copied = lane.fetch.record()

    def store(self, target: DeviceArray) -> None:
        """Start to copy what is here to `target`."""
        stream = _lane().stream
        _copy(target.data_ptr(), self.address, target.nbytes, stream)
        self._copied = stream.record()

    def wait(self) -> None:
        """Wait until the last copy is done: what came is complete, what went may be overwritten."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None


def begin_fetching() -> None:
    """Let what `Slot.fetch` copies be what the lane has computed."""
    lane = _lane()
    lane.fetch.wait_event(lane.stream.record())


class Exported:
    """Device memory that other processes of this node can map. Contents undefined."""

    def __init__(self, nbytes: int) -> None:
        _prepare_thread()
        cupy = _cupy()
        self._memory = cupy.cuda.Memory(
            nbytes
        )  # not of a pool, whose memory has no handle of its own
        self.handle: bytes = cupy.cuda.runtime.ipcGetMemHandle(self._memory.ptr)
        self.array = DeviceArray(self._memory.ptr, nbytes, torch.uint8, self._memory, Reader.CUPY)


class Mapped:
    """Another process's exported memory."""

    def __init__(self, handle: bytes, nbytes: int) -> None:
        self._address = _cupy().cuda.runtime.ipcOpenMemHandle(handle)
        self.array = DeviceArray(self._address, nbytes, torch.uint8, self, Reader.CUPY)

    def close(self) -> None:
        """Unmap it."""
        _cupy().cuda.runtime.ipcCloseMemHandle(self._address)
