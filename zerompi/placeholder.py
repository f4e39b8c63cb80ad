"""What stands in a parameter or a gradient whose values are elsewhere."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


class Placeholder:
    """One element expanded to the shape of `tensor`: no memory, and NaN when it is read.

    On the tensor's device, or another one.
    """

    def __init__(
        self, tensor: Tensor, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        is_number = dtype.is_floating_point or dtype.is_complex
        self._value = float("nan") if is_number else 0
        with torch.inference_mode(False):
            self._element = torch.empty((), dtype=dtype, device=device or tensor.device)
            self._expanded = self._element.expand(tensor.shape)
        self._element.fill_(self._value)
        # On the host the element is written as bytes, which takes a fifth of the time.
        self._address, self._bytes, self._content = 0, memoryview(b""), b""
        if self._element.device.type == "cpu":
            self._address = self._element.data_ptr()
            memory = (ctypes.c_char * dtype.itemsize).from_address(self._address)
            self._bytes = memoryview(memory).cast("B")
            self._content = bytes(self._bytes)

    def fresh(self) -> Tensor:
        """It, whatever somebody has written into it before."""
        if self._element.data_ptr() == self._address:
            self._bytes[:] = self._content
        else:  # on a device; or share_memory_ has moved it
            self._element.fill_(self._value)
        return self._expanded


def placeholder(tensor: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """A `Placeholder` that is used once."""
    return Placeholder(tensor, dtype, device).fresh()
