"""Block quantization on the device: the same bits as `zerompi.kernels.quantization` on the host.

A warp works on one block of values at a time, a lane on two neighbours: they share a byte if codes
have 4 bits. What is quantized again after a sum is summed twice, once to find the largest magnitude
and once for the codes: the packed arrays are small and in the cache the second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from zerompi.device.compiler import THREADS, addresses, launch, to_device
from zerompi.kernels.casting import CONVERSIONS, NAMES, require_flat
from zerompi.kernels.quantization import (
    check_error_arrays,
    check_packed,
    check_packed_list,
    packed_numel,
)

_WARPS = THREADS // 32  # in a block of threads

SOURCE = (
    CONVERSIONS
    + r"""
typedef unsigned char byte;

template <int BITS> struct Format;
template <> struct Format<8> {
    static constexpr float largest_code = 127.0f, largest_scale = 0x1.020406p+121f;
};
template <> struct Format<4> {
    static constexpr float largest_code = 7.0f, largest_scale = 0x1.249248p+125f;
};

struct Pair { float x, y; };

// -- where values come from: pair(i, b, both) is values i and i + 1, both in block b ----------

template <typename T>
struct Values {
    const T* values;
    __device__ __forceinline__ Pair pair(int64 i, int64 b, bool both) const {
        return {widen(values[i]), both ? widen(values[i + 1]) : 0.0f};
    }
};

__device__ __forceinline__ float load_scale(const byte* place) {
    if (((unsigned long long)place & 3) == 0) return *(const float*)place;
    return __uint_as_float(
        place[0] | (unsigned)place[1] << 8 | (unsigned)place[2] << 16 | (unsigned)place[3] << 24
    );
}

__device__ __forceinline__ void store_scale(byte* place, float scale) {
    unsigned bits = __float_as_uint(scale);
    for (int k = 0; k < 4; ++k) place[k] = bits >> 8 * k;
}

// `packed`: the addresses of `count` packed arrays.
template <int BITS>
struct Sum {
    const byte* const* packed;
    int count;
    int64 blocks;
    float factor;
    __device__ __forceinline__ Pair pair(int64 i, int64 b, bool both) const {
        Pair total;
        for (int k = 0; k < count; ++k) {
            const byte* codes = packed[k] + 4 * blocks;
            float scale = load_scale(packed[k] + 4 * b);
            int low, high = 0;
            if (BITS == 8) {
                low = (signed char)codes[i];
                if (both) high = (signed char)codes[i + 1];
            } else {
                low = (signed char)(codes[i / 2] << 4) >> 4;
                high = (signed char)codes[i / 2] >> 4;
            }
            Pair next = {(float)low * scale, (float)high * scale};
            total = k == 0 ? next : Pair{total.x + next.x, total.y + next.y};
        }
        return {total.x * factor, total.y * factor};
    }
};

// -- blocks ----------------------------------------------------------------------------------

__device__ __forceinline__ unsigned magnitude(float x) { return __float_as_uint(x) & 0x7fffffff; }

// From the bits of the largest magnitude, which are in the order of the numbers.
template <int BITS>
__device__ __forceinline__ float scale_of(unsigned largest) {
    if (largest >= 0x7f800000) return __uint_as_float(0x7fc00000);
    float peak = __uint_as_float(largest);
    float scale = peak / Format<BITS>::largest_code;
    if (scale * Format<BITS>::largest_code < peak) {
        scale = __uint_as_float(__float_as_uint(scale) + 1);
    }
    return fminf(scale, Format<BITS>::largest_scale);
}

template <int BITS, typename Source>
__device__ __forceinline__ void quantize(Source source, byte* packed, int64 n, int64 block) {
    const int lane = threadIdx.x % 32;
    const int64 blocks = (n + block - 1) / block;
    byte* codes = packed + 4 * blocks;
    for (int64 b = first_index() / 32; b < blocks; b += stride() / 32) {
        const int64 first = b * block + 2 * lane, stop = min((b + 1) * block, n);
        unsigned largest = 0;
        for (int64 i = first; i < stop; i += 64) {
            Pair pair = source.pair(i, b, i + 1 < stop);
            largest = max(largest, max(magnitude(pair.x), magnitude(pair.y)));
        }
        for (int distance = 16; distance > 0; distance /= 2) {
            largest = max(largest, __shfl_xor_sync(0xffffffff, largest, distance));
        }
        const float scale = scale_of<BITS>(largest);
        const float divisor = scale > 0 ? scale : 1.0f;
        const bool lost = scale != scale;
        if (lane == 0) store_scale(packed + 4 * b, scale);
        for (int64 i = first; i < stop; i += 64) {
            const bool both = i + 1 < stop;
            Pair pair = source.pair(i, b, both);
            int low = lost ? 0 : __float2int_rn(pair.x / divisor);
            int high = lost ? 0 : __float2int_rn(pair.y / divisor);
            if (BITS == 8) {
                codes[i] = low;
                if (both) codes[i + 1] = high;
            } else {
                codes[i / 2] = (low & 15) | high << 4;
            }
        }
    }
}

template <int BITS, typename T>
__device__ __forceinline__ void dequantize(Sum<BITS> source, T* out, int64 n, int64 block) {
    for (int64 b = first_index() / 32; b < source.blocks; b += stride() / 32) {
        const int64 stop = min((b + 1) * block, n);
        for (int64 i = b * block + 2 * (threadIdx.x % 32); i < stop; i += 64) {
            const bool both = i + 1 < stop;
            Pair pair = source.pair(i, b, both);
            narrow(pair.x, out[i]);
            if (both) narrow(pair.y, out[i + 1]);
        }
    }
}

// `source` is one packed array.
template <int BITS>
__device__ __forceinline__ void subtract(
    const float* values, Sum<BITS> source, float* out, int64 n, int64 block
) {
    for (int64 b = first_index() / 32; b < source.blocks; b += stride() / 32) {
        const int64 stop = min((b + 1) * block, n);
        for (int64 i = b * block + 2 * (threadIdx.x % 32); i < stop; i += 64) {
            const bool both = i + 1 < stop;
            Pair pair = source.pair(i, b, both);
            float low = values[i] - pair.x, high = both ? values[i + 1] - pair.y : 0.0f;
            out[i] = magnitude(low) < 0x7f800000 ? low : 0.0f;
            if (both) out[i + 1] = magnitude(high) < 0x7f800000 ? high : 0.0f;
        }
    }
}

#define TO_AND_FROM(BITS, NAME, T)                                                          \
    extern "C" __global__ void quantize_##NAME##_##BITS(                                    \
        const T* values, byte* packed, int64 n, int64 block                                 \
    ) {                                                                                     \
        quantize<BITS>(Values<T>{values}, packed, n, block);                                \
    }                                                                                       \
    extern "C" __global__ void dequantize_##NAME##_##BITS(                                  \
        const byte* const* packed, int count, float factor, T* out, int64 n, int64 block     \
    ) {                                                                                     \
        dequantize(Sum<BITS>{packed, count, (n + block - 1) / block, factor}, out, n, block); \
    }

#define FORMAT(BITS)                                                                        \
    TO_AND_FROM(BITS, float32, float)                                                       \
    TO_AND_FROM(BITS, float16, float16)                                                     \
    TO_AND_FROM(BITS, bfloat16, bfloat16)                                                   \
    extern "C" __global__ void requantize_##BITS(                                           \
        const byte* const* packed, int count, float factor, byte* out, int64 n, int64 block  \
    ) {                                                                                     \
        Sum<BITS> sum = {packed, count, (n + block - 1) / block, factor};                    \
        quantize<BITS>(sum, out, n, block);                                                 \
    }                                                                                       \
    extern "C" __global__ void subtract_##BITS(                                             \
        const byte* const* packed, int count, float factor, const float* values, float* out, \
        int64 n, int64 block                                                                \
    ) {                                                                                     \
        Sum<BITS> sum = {packed, count, (n + block - 1) / block, factor};                    \
        subtract(values, sum, out, n, block);                                               \
    }

FORMAT(8)
FORMAT(4)
"""
)


def launch_quantize(values: Any, packed: Any, bits: int, block: int) -> None:
    """`quantize` of CuPy arrays."""
    require_flat("values", values)
    check_packed("packed", packed, values.size, bits, block)
    name = f"quantize_{NAMES[values.dtype]}_{bits}"
    _launch(name, values.size, block, values, packed)


def launch_dequantize(packed: Any, out: Any, bits: int, block: int) -> None:
    """`dequantize` of CuPy arrays."""
    launch_dequantize_sum([packed], out, bits, block)


def launch_dequantize_sum(
    packed_list: Sequence[Any], out: Any, bits: int, block: int, scale: float = 1.0
) -> None:
    """`dequantize_sum` of CuPy arrays."""
    require_flat("out", out)
    check_packed_list(packed_list, out.size, bits, block)
    name = f"dequantize_{NAMES[out.dtype]}_{bits}"
    _launch(name, out.size, block, *_summands(packed_list, scale), out)


def launch_dequantize_sum_quantize(
    packed_list: Sequence[Any], packed_out: Any, bits: int, block: int, scale: float = 1.0
) -> None:
    """`dequantize_sum_quantize` of CuPy arrays."""
    n = packed_numel(packed_out.size, bits, block)
    check_packed("packed_out", packed_out, n, bits, block)
    check_packed_list(packed_list, n, bits, block)
    _launch(f"requantize_{bits}", n, block, *_summands(packed_list, scale), packed_out)


def launch_quantization_error(values: Any, packed: Any, out: Any, bits: int, block: int) -> None:
    """`quantization_error` of CuPy arrays."""
    check_error_arrays(values, packed, out, bits, block)
    summands = _summands([packed], 1.0)
    _launch(f"subtract_{bits}", values.size, block, *summands, values, out)


def _summands(packed_list: Sequence[Any], scale: float) -> tuple[Any, np.int32, np.float32]:
    return to_device(addresses(packed_list)), np.int32(len(packed_list)), np.float32(scale)


def _launch(name: str, n: int, block: int, *arguments: Any) -> None:
    """A warp for each block of values."""
    blocks = -(-n // block)
    launch(SOURCE, name, -(-blocks // _WARPS), *arguments, np.int64(n), np.int64(block))
