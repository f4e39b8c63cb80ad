"""CuPy, and through it the driver: which devices there are, and which one is this process's."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from zerompi.errors import ZerompiError

_is_active = False
_number: int | None = None  # of the device of this process; others' threads have to be told


@cache
def cupy() -> Any:
    """The library; the one place that imports it."""
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
        return int(cupy().cuda.runtime.getDeviceCount())
    except Exception:  # CuPy's own, of a missing driver or library: it says "none"
        return 0


def name(number: int) -> str:
    """What the driver calls a device."""
    properties = cupy().cuda.runtime.getDeviceProperties(number)
    return str(properties["name"].decode())


def identity(number: int) -> str:
    """What tells a device from all others of the machine, whatever its number is here."""
    return bytes(cupy().cuda.runtime.getDeviceProperties(number)["uuid"]).hex()


def use(number: int) -> None:
    """Make a device that of this process, for CuPy and, where it has it, torch.cuda.

    From now on CPU tensors over device memory are recognised, and CuPy takes memory from
    torch.cuda's allocator, so that two pools do not hold on to the same memory.
    """
    cupy().cuda.Device(number).use()
    if has_torch_cuda():
        torch.cuda.set_device(number)
    activate(number)


def is_active() -> bool:
    """Whether this process has had device buffers."""
    return _is_active


def activate(number: int) -> None:
    """Take note of the device that has this process's buffers."""
    global _is_active, _number
    if not _is_active:
        if has_torch_cuda():
            _share_allocator()
        _is_active = True
    _number = number


def prepare_thread() -> None:
    """Give a new thread the device of this process; CUDA would give it the first."""
    if _number is not None:
        cupy().cuda.Device(_number).use()


@cache
def has_torch_cuda() -> bool:
    """Whether torch.cuda computes."""
    return torch.cuda.is_available()


def _share_allocator() -> None:
    """Let CuPy allocate what torch's caching allocator has."""
    library = cupy()

    def allocate(nbytes: int, number: int) -> int:
        stream = library.cuda.get_current_stream(number).ptr
        return int(torch.cuda.caching_allocator_alloc(nbytes, number, stream))

    def free(address: int, number: int) -> None:
        torch.cuda.caching_allocator_delete(address)

    library.cuda.set_allocator(library.cuda.PythonFunctionAllocator(allocate, free).malloc)
