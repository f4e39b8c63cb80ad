"""Kinds of memory, and flat arrays in that of a device: data, without any library of devices."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor


class Reader(Enum):
    """Who fills and reads a buffer, hence whose streams a collective is ordered with."""

    CUPY = "CuPy's current stream"
    TORCH = "torch.cuda's current stream"
    HOST = "the host"


class Space(NamedTuple):
    """Where the buffers of a partition lie.

    Attributes:
        device: of their tensors.
        is_device: whether it is device memory; with `device` the CPU, such that the host can address.
    """

    device: torch.device
    is_device: bool


HOST = Space(torch.device("cpu"), is_device=False)


class DeviceArray:
    """Flat device memory with as much of a 1-D tensor's interface as collectives need.

    Args:
        address: of the first element.
        numel: elements.
        dtype: of torch's; CuPy need not have it.
        owner: keeps the memory alive.
        reader: who fills and reads it.
    """

    __slots__ = ("_address", "_numel", "_owner", "dtype", "reader")

    def __init__(
        self, address: int, numel: int, dtype: torch.dtype, owner: object, reader: Reader
    ) -> None:
        self._address = address
        self._numel = numel
        self.dtype = dtype
        self._owner = owner
        self.reader = reader

    def __len__(self) -> int:
        return self._numel

    def __getitem__(self, part: slice) -> DeviceArray:
        start, stop, _ = part.indices(self._numel)
        address = self._address + start * self.dtype.itemsize
        return DeviceArray(address, max(0, stop - start), self.dtype, self._owner, self.reader)

    def numel(self) -> int:
        """How many elements."""
        return self._numel

    def element_size(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    def data_ptr(self) -> int:
        """The address of the first element."""
        return self._address

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self._numel * self.dtype.itemsize

    def view(self, dtype: torch.dtype) -> DeviceArray:
        """The same memory as elements of another dtype."""
        numel = self.nbytes // dtype.itemsize
        return DeviceArray(self._address, numel, dtype, self._owner, self.reader)


Flat: TypeAlias = "Tensor | DeviceArray"  # 1-D memory that collectives work on
