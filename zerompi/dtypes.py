"""In which dtype sums are accumulated."""

from __future__ import annotations

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a sum of `dtype` is accumulated.

    Floating-point dtypes narrower than 32 bits accumulate in float32, complex32 in complex64, all
    others in themselves. A sum of bool is the logical or.

    Raises:
        TypeError: torch defines no sum for `dtype` (quantized and bit-packed dtypes).
    """
    if dtype.is_floating_point and dtype.itemsize < 4:
        return torch.float32
    if dtype is torch.complex32:
        return torch.complex64
    if not (dtype.is_floating_point or dtype.is_complex) and dtype not in _INTEGERS:
        raise TypeError(f"dtype: expected one that can be summed, got {dtype}")
    return dtype


_INTEGERS = frozenset(
    {
        torch.bool,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
    }
)
