"""What stands in a parameter or a gradient whose values are elsewhere."""

from __future__ import annotations

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

    def fresh(self) -> Tensor:
        """It, whatever somebody has written into it before."""
        self._element.fill_(self._value)
        return self._expanded


def placeholder(tensor: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """A `Placeholder` that is used once."""
    return Placeholder(tensor, dtype, device).fresh()
