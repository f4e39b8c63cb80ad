"""The sum of squares, in one order whatever the device; not finite if any value is not.

Squares of float32 are exact in float64, and as many of them as a memory holds cannot overflow it. So
the sum is infinite or NaN exactly if a value is, and one pass finds both the norm and an overflow.

Order: values are cut into tiles of 32 rows of 256. Rows of a tile are added from the first to the
last; of the 256 sums the upper half is added to the lower until one is left. The sums of the tiles
are added in the same way, as if they were one tile of as many rows as they need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from zerompi.device.compiler import THREADS, empty, launch
from zerompi.kernels.casting import CONVERSIONS, NAMES, require_flat, widen

Array = np.ndarray[Any, Any]

_ROWS = 32
_TILE = _ROWS * THREADS
_TILES_AT_A_TIME = 4  # on the host: half a MiB of intermediate results

SOURCE = (
    CONVERSIONS
    + r"""
const int WIDTH = 256;  // threads of a block
const int TILE = 32 * WIDTH;

// The sum over the block; every thread calls this, and thread 0 gets it.
__device__ __forceinline__ double add_threads(double mine) {
    __shared__ double sums[WIDTH];
    sums[threadIdx.x] = mine;
    for (int half = WIDTH / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    double total = threadIdx.x == 0 ? sums[0] : 0;
    __syncthreads();  // the next call overwrites the sums
    return total;
}

template <typename T>
__device__ __forceinline__ void add_tiles(const T* values, double* sums, int64 n) {
    int64 tiles = (n + TILE - 1) / TILE;
    for (int64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        int64 stop = min((tile + 1) * TILE, n);
        double mine = 0;
        for (int64 i = tile * TILE + threadIdx.x; i < stop; i += WIDTH) {
            double x = widen(values[i]);
            mine += x * x;
        }
        double total = add_threads(mine);
        if (threadIdx.x == 0) sums[tile] = total;
    }
}

#define TILES(NAME, T)                                                                      \
    extern "C" __global__ void NAME(const T* values, double* sums, int64 n) {               \
        add_tiles(values, sums, n);                                                         \
    }

TILES(tiles_float32, float)
TILES(tiles_float16, float16)
TILES(tiles_bfloat16, bfloat16)

extern "C" __global__ void add_sums(const double* sums, double* out, int64 n) {
    double mine = 0;
    for (int64 i = threadIdx.x; i < n; i += WIDTH) mine += sums[i];
    double total = add_threads(mine);
    if (threadIdx.x == 0) out[0] = total;
}
"""
)


def sum_of_squares(values: Array) -> float:
    """The sum of squares of float32, float16 or bfloat16 values.

    Raises:
        TypeError: another dtype.
        ValueError: not contiguous and 1-D.
    """
    require_flat("values", values)
    sums = np.zeros(_ceil(values.size, _TILE))
    step = _TILES_AT_A_TIME * _TILE
    wide = np.empty(step, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, values.size, step):
            part = values[start : start + step]
            if part.itemsize == 2:
                widen(part, wide[: part.size])
                part = wide[: part.size]
            tiles = _ceil(part.size, _TILE)
            squares = np.zeros(tiles * _TILE)
            np.square(part, out=squares[: part.size], dtype=np.float64)
            first = start // _TILE
            sums[first : first + tiles] = _add_rows(squares.reshape(tiles, _ROWS, THREADS))
        rows = max(_ceil(sums.size, THREADS), 1)
        padded = np.zeros(rows * THREADS)
        padded[: sums.size] = sums
        return float(_add_rows(padded.reshape(1, rows, THREADS))[0])


def launch_sums_of_squares(arrays: Sequence[Any]) -> Any:
    """`sum_of_squares` of each CuPy array: a float64 CuPy array of them, still to be computed."""
    out = empty(len(arrays), np.float64)
    for number, values in enumerate(arrays):
        require_flat("values", values)
        tiles = _ceil(values.size, _TILE)
        sums = empty(tiles, np.float64)
        launch(SOURCE, f"tiles_{NAMES[values.dtype]}", tiles, values, sums, np.int64(values.size))
        launch(SOURCE, "add_sums", 1, sums, out[number : number + 1], np.int64(tiles))
    return out


def _add_rows(numbers: Array) -> Array:
    """The sum of each tile of (tiles, rows, `THREADS`) numbers; see the order above."""
    total: Array = numbers[:, 0].copy()
    for row in range(1, numbers.shape[1]):
        total += numbers[:, row]
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    return total[:, 0]


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)
