"""Between many arrays and one flat buffer: a bucket is filled, or emptied, by one launch.

For arrays that stay where they are. A partition has none that it would copy in each step: its parameters,
main weights and states lie in flat buffers, and what is done to these is one launch already.
Gradients come one by one, each at a new address. To pack them, a unit would keep all of them beside its
bucket, and send a new table of addresses for each pass, which takes about as long as the copies it spares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from zerompi.device.compiler import addresses, launch, to_device

Array = np.ndarray[Any, Any]

_TILE = 16 << 10  # bytes that a block of threads copies at a time

SOURCE = r"""
typedef long long int64;
const int64 TILE = 16 << 10;

// `tables`: the arrays' addresses; their places in the flat buffer; where each begins among the
// bytes to copy, and where the last ends. Everything counts bytes, in whole words.
template <typename Word, bool PACK>
__device__ __forceinline__ void copy(char* flat, const int64* tables, int64 count) {
    const int64* address = tables;
    const int64* offset = tables + count;
    const int64* begin = tables + 2 * count;
    int64 total = begin[count];
    for (int64 start = blockIdx.x * TILE; start < total; start += gridDim.x * TILE) {
        int64 stop = min(start + TILE, total);
        int64 low = 0, high = count;  // the array that holds `start` is in [low, high)
        while (high - low > 1) {
            int64 middle = (low + high) / 2;
            if (begin[middle] <= start) low = middle; else high = middle;
        }
        int64 from = start;
        for (int64 i = low; from < stop; ++i) {
            int64 to = min(begin[i + 1], stop);
            Word* there = (Word*)(flat + offset[i] + (from - begin[i]));
            Word* here = (Word*)(address[i] + (from - begin[i]));
            int64 words = (to - from) / (int64)sizeof(Word);
            for (int64 word = threadIdx.x; word < words; word += blockDim.x) {
                if (PACK) there[word] = here[word]; else here[word] = there[word];
            }
            from = to;
        }
    }
}

#define COPY(BYTES, WORD)                                                                   \
    extern "C" __global__ void pack_##BYTES(char* flat, const int64* tables, int64 count) { \
        copy<WORD, true>(flat, tables, count);                                              \
    }                                                                                       \
    extern "C" __global__ void unpack_##BYTES(char* flat, const int64* tables, int64 count) { \
        copy<WORD, false>(flat, tables, count);                                             \
    }

COPY(1, unsigned char)
COPY(2, unsigned short)
COPY(4, unsigned int)
COPY(8, uint2)
COPY(16, uint4)
"""


def pack(arrays: Sequence[Array], offsets: Sequence[int], flat: Array) -> None:
    """Copy each array to its offset (in elements) in `flat`; the rest of it stays as it is.

    Args:
        arrays: contiguous, of any shapes, of the dtype of `flat`.
        offsets: one for each array; their ranges do not overlap.
        flat: contiguous, 1-D.

    Raises:
        TypeError: of different dtypes.
        ValueError: not contiguous, or not inside `flat`.
    """
    _check(arrays, offsets, flat)
    for array, offset in zip(arrays, offsets, strict=True):
        flat[offset : offset + array.size] = array.reshape(-1)


def unpack(flat: Array, arrays: Sequence[Array], offsets: Sequence[int]) -> None:
    """The other way round: fill each array from its offset in `flat`."""
    _check(arrays, offsets, flat)
    for array, offset in zip(arrays, offsets, strict=True):
        array.reshape(-1)[:] = flat[offset : offset + array.size]


class DevicePacking:
    """`pack` and `unpack` of the same CuPy arrays again and again; their addresses are kept.

    Args:
        arrays: as for `pack`; kept alive.
        offsets: as for `pack`.
    """

    def __init__(self, arrays: Sequence[Any], offsets: Sequence[int]) -> None:
        self._arrays = tuple(arrays)
        self._offsets = tuple(offsets)
        starts = addresses(self._arrays)
        sizes = [array.nbytes for array in self._arrays]
        places = [
            offset * array.itemsize
            for array, offset in zip(self._arrays, self._offsets, strict=True)
        ]
        self._nbytes = sum(sizes)
        # The largest word that divides all of them; an empty array does not count.
        used = [numbers for numbers in zip(starts, sizes, places, strict=True) if numbers[1]]
        self._word = math.gcd(16, *(number for numbers in used for number in numbers))
        self._tables = to_device([*starts, *places, *accumulate(sizes, initial=0)])

    def pack(self, flat: Any) -> None:
        """Fill a flat CuPy array; raises as `zerompi.kernels.packing.pack` does."""
        self._launch("pack", flat)

    def unpack(self, flat: Any) -> None:
        """Fill the arrays from a flat CuPy array; raises as `pack` does."""
        self._launch("unpack", flat)

    def _launch(self, direction: str, flat: Any) -> None:
        _check(self._arrays, self._offsets, flat)
        word = math.gcd(self._word, *addresses([flat]))
        blocks = -(-self._nbytes // _TILE)
        count = np.int64(len(self._arrays))
        launch(SOURCE, f"{direction}_{word}", blocks, flat, self._tables, count)


def _check(arrays: Sequence[Any], offsets: Sequence[int], flat: Any) -> None:
    if len(arrays) != len(offsets):
        raise ValueError(f"offsets: expected {len(arrays)}, got {len(offsets)}")
    if flat.ndim != 1 or not flat.flags.c_contiguous:
        raise ValueError(f"flat: expected a contiguous 1-D array, got shape {flat.shape}")
    for index, (array, offset) in enumerate(zip(arrays, offsets, strict=True)):
        if array.dtype != flat.dtype:
            raise TypeError(f"arrays[{index}]: expected {flat.dtype}, got {array.dtype}")
        if not array.flags.c_contiguous:
            raise ValueError(f"arrays[{index}]: expected a contiguous array, got strides")
        if offset < 0 or offset + array.size > flat.size:
            raise ValueError(
                f"offsets[{index}]: expected {array.size} elements inside a flat buffer of "
                f"{flat.size}, got offset {offset}"
            )
