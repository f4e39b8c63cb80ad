"""Memory of flat buffers."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from zerompi import device
from zerompi.memory import HOST, Space

# mallopt(3) of the GNU C library. Normally the threshold above which malloc maps memory of its own
# grows with what is freed, up to 32 MiB; these are the values at the end of that growth.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MAX_MMAP_THRESHOLD_NBYTES = 32 << 20
_MIN_MAPPING_NBYTES = 64 << 10

_mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
_lock = threading.Lock()
_inside = 0  # how many threads allocate such buffers now


@contextmanager
def _own_mapping() -> Iterator[None]:
    """Let what is allocated inside be a mapping of its own, that goes back to the system when it is freed.

    On the heap, buffers that come and go would leave holes between the small things allocated
    meanwhile: at stage 3 they would take a multiple of their size.
    """
    _count(+1)
    try:
        yield
    finally:
        _count(-1)


def _count(change: int) -> None:
    global _inside
    with _lock:
        _inside += change
        if _mallopt is None:
            return
        if _inside:
            _mallopt(_M_MMAP_THRESHOLD, _MIN_MAPPING_NBYTES)
        else:
            _mallopt(_M_MMAP_THRESHOLD, _MAX_MMAP_THRESHOLD_NBYTES)
            _mallopt(_M_TRIM_THRESHOLD, 2 * _MAX_MMAP_THRESHOLD_NBYTES)


def give_back_heap() -> None:
    """Return to the system what was freed on the heap, which else keeps it (malloc_trim(3))."""
    if _malloc_trim is not None:
        _malloc_trim(0)


class Buffer:
    """A 1-D tensor that is going to be communicated.

    Attributes:
        tensor: this rank's elements.
        peers: the elements of each rank of the node, in rank order, where these can read each other's
            memory; else None.
        nbytes: of the tensor.
    """

    def __init__(self, tensor: Tensor, peers: Sequence[Tensor] | None = None) -> None:
        self.tensor = tensor
        self.peers = peers
        self.nbytes = tensor.nbytes


def allocate(numel: int, dtype: torch.dtype, space: Space = HOST) -> Tensor:
    """A 1-D tensor, contents undefined; on the host its memory goes back to the system with it."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return allocate(numel, dtype, space)
    if space.is_device:
        return device.allocate(numel, dtype, space)
    if numel * dtype.itemsize < _MIN_MAPPING_NBYTES:
        return torch.empty(numel, dtype=dtype)
    with _own_mapping():
        return torch.empty(numel, dtype=dtype)


def lend(tensor: Tensor) -> tuple[Tensor, weakref.ref[object] | None]:
    """The same elements for somebody else, and a reference that is dead when nobody has them any more.

    Whatever looks at the memory (views, detached tensors, NumPy arrays) counts. None of no elements.
    """
    if not tensor.numel():
        return tensor, None
    if tensor.is_cuda:
        lent = device.Lent(tensor)
        return lent.tensor(), weakref.ref(lent)
    memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    memory.owner = tensor  # type: ignore[attr-defined]
    return torch.frombuffer(memory, dtype=tensor.dtype), weakref.ref(memory)
