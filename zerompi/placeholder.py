"""What stands in a parameter or a gradient whose values are elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor


def placeholder(tensor: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """One element expanded to the shape of `tensor`: no memory, and NaN when it is read.

    On the tensor's device, or another one.
    """
    device = device or tensor.device
    if dtype.is_floating_point or dtype.is_complex:
        value = torch.full((), float("nan"), dtype=dtype, device=device)
    else:
        value = torch.zeros((), dtype=dtype, device=device)
    return value.expand(tensor.shape)
