"""Collectives in order with the streams of a device."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from torch import Tensor

from zerompi import device
from zerompi.arrays import on_device
from zerompi.memory import DeviceArray, Reader

_Function = TypeVar("_Function", bound=Callable[..., Any])


def on_any_memory(collective: _Function) -> _Function:
    """Let a collective that is given tensors or `DeviceArray`s work on memory of a device, too.

    Such memory among its positional arguments arrives as `DeviceArray`s, and what the collective
    does to it comes after what was done before, and before what is done later.
    """

    @wraps(collective)
    def ordered(*args: Any, **kwargs: Any) -> Any:
        if not device.is_active():
            return collective(*args, **kwargs)
        flats = [on_device(arg) if isinstance(arg, Tensor) else arg for arg in args]
        arrays = [flat for flat in flats if isinstance(flat, DeviceArray)]
        if not arrays:
            return collective(*args, **kwargs)
        # Nothing lies nowhere.
        flats = [_nothing(flat) if isinstance(flat, Tensor) else flat for flat in flats]
        with device.ordered(arrays):
            return collective(*flats, **kwargs)

    return ordered  # type: ignore[return-value]


def _nothing(tensor: Tensor) -> DeviceArray:
    assert not tensor.numel(), "buffers of one collective lie in one kind of memory"
    return DeviceArray(0, 0, tensor.dtype, None, Reader.HOST)
