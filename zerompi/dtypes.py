"""In which dtype sums are accumulated."""

from __future__ import annotations

import torch

# torch does not add these; modulo 2^n a sum of two's complements has the same bits.
SAME_SUM = {
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
}
_INTEGERS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *SAME_SUM}
_PACKED = {getattr(torch, "float4_e2m1fn_x2", None)}  # two values in a byte; not in every torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a sum of `dtype` is accumulated.

    Floating-point dtypes narrower than 32 bits accumulate in float32, complex32 in complex64, all
    others in themselves. A sum of bool is the logical or; a sum of integers wraps around.

    Raises:
        TypeError: torch defines no sum for `dtype` (quantized, sub-byte and bit-packed dtypes).
    """
    if dtype is torch.complex32:
        return torch.complex64
    if dtype in _PACKED or not (dtype.is_floating_point or dtype.is_complex or dtype in _INTEGERS):
        raise TypeError(f"dtype: expected one that can be summed, got {dtype}")
    if dtype.is_floating_point and dtype.itemsize < 4:
        return torch.float32
    return dtype
