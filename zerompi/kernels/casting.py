"""Between float32 and the narrow dtypes, float16 and bfloat16 (as uint16): rounded to nearest, ties to even.

A NaN stays one; what becomes too large is infinite.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from zerompi.device.compiler import THREADS, launch

Array = np.ndarray[Any, Any]

# What the kernels call the dtypes.
NAMES = {
    np.dtype(np.float32): "float32",
    np.dtype(np.float16): "float16",
    np.dtype(np.uint16): "bfloat16",
}
_CHUNK = 32 << 10  # values at a time, so that intermediate results stay in a core's own cache

# Included in the source of every kernel.
CONVERSIONS = r"""
typedef long long int64;

struct float16 { unsigned short bits; };
struct bfloat16 { unsigned short bits; };

__device__ __forceinline__ float widen(float x) { return x; }

__device__ __forceinline__ float widen(bfloat16 x) {
    return __uint_as_float((unsigned)x.bits << 16);
}

__device__ __forceinline__ float widen(float16 x) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
}

__device__ __forceinline__ void narrow(float x, float& result) { result = x; }

__device__ __forceinline__ void narrow(float x, bfloat16& result) {
    unsigned bits = __float_as_uint(x);
    // Half of the last place that is kept, or just less where that is even.
    bits += 0x7fff + (bits >> 16 & 1);
    result.bits = x != x ? 0x7fc0 : bits >> 16;
}

__device__ __forceinline__ void narrow(float x, float16& result) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    result.bits = x != x ? 0x7e00 : bits;
}

__device__ __forceinline__ int64 first_index() {
    return (int64)blockIdx.x * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ int64 stride() { return (int64)gridDim.x * blockDim.x; }
"""

SOURCE = (
    CONVERSIONS
    + r"""
template <typename From, typename To>
__device__ __forceinline__ void cast(const From* values, To* out, int64 n) {
    for (int64 i = first_index(); i < n; i += stride()) narrow(widen(values[i]), out[i]);
}

#define CAST(NAME, FROM, TO)                                                                \
    extern "C" __global__ void NAME(const FROM* values, TO* out, int64 n) {                 \
        cast(values, out, n);                                                               \
    }

CAST(float32_to_float16, float, float16)
CAST(float32_to_bfloat16, float, bfloat16)
CAST(float16_to_float32, float16, float)
CAST(bfloat16_to_float32, bfloat16, float)
"""
)


def cast(values: Array, out: Array) -> None:
    """`out` becomes `values`; one of the two is float32, the other float16 or bfloat16.

    Raises:
        TypeError: other dtypes.
        ValueError: of different shapes, or not contiguous and 1-D.
    """
    _check(values, out)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, values.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            (narrow if out.itemsize == 2 else widen)(values[part], out[part])


def launch_cast(values: Any, out: Any) -> None:
    """`cast` on the device, with CuPy arrays."""
    _check(values, out)
    name = f"{NAMES[values.dtype]}_to_{NAMES[out.dtype]}"
    launch(SOURCE, name, -(-values.size // THREADS), values, out, np.int64(values.size))


def widen(values: Array, out: Array) -> None:
    """`cast` of float16 or bfloat16 to float32, in one piece and unchecked."""
    if values.dtype == np.float16:
        np.copyto(out, values)
    else:
        bits = out.view(np.uint32)
        np.copyto(bits, values)
        np.left_shift(bits, 16, out=bits)


def narrow(values: Array, out: Array) -> None:
    """`cast` of float32 to float16 or bfloat16, in one piece and unchecked."""
    if out.dtype == np.float16:
        np.copyto(out, values, casting="unsafe")
    else:
        bits = values.view(np.uint32)
        rounded = bits >> 16
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        rounded >>= 16
        np.copyto(out, rounded, casting="unsafe")
    is_nan = np.isnan(values)
    if is_nan.any():
        out.view(np.uint16)[is_nan] = 0x7E00 if out.dtype == np.float16 else 0x7FC0


def require_flat(name: str, array: Any) -> None:
    """Refuse what is not a contiguous 1-D array of float32, float16 or bfloat16 (uint16).

    Raises:
        TypeError: another dtype.
        ValueError: another shape or layout.
    """
    if array.dtype not in NAMES:
        raise TypeError(f"{name}: expected float32, float16 or uint16, got {array.dtype}")
    if array.ndim != 1 or not array.flags.c_contiguous:
        raise ValueError(f"{name}: expected a contiguous 1-D array, got shape {array.shape}")


def _check(values: Any, out: Any) -> None:
    require_flat("values", values)
    require_flat("out", out)
    if {values.itemsize, out.itemsize} != {2, 4}:
        raise TypeError(
            f"out: expected float32 and a narrow dtype, got {values.dtype} to {out.dtype}"
        )
    if values.shape != out.shape:
        raise ValueError(f"out: expected shape {values.shape}, got {out.shape}")
