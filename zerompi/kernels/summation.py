"""The sum of several ranks' summands on a device, bit for bit that of `collectives.summation`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from zerompi.device.compiler import THREADS, launch, to_device
from zerompi.memory import DeviceArray

# dtype -> kernel. Sums of integers wrap around, so those of two's complements need no kernels of their own.
SUM_KERNELS = {
    torch.float32: "sum_float32",
    torch.float64: "sum_float64",
    torch.float16: "sum_float16",
    torch.bfloat16: "sum_bfloat16",
    torch.bool: "sum_bool",
    torch.uint8: "sum_8",
    torch.int8: "sum_8",
    torch.uint16: "sum_16",
    torch.int16: "sum_16",
    torch.uint32: "sum_32",
    torch.int32: "sum_32",
    torch.uint64: "sum_64",
    torch.int64: "sum_64",
}

# Every kernel takes a table of `count` addresses of summands, `out`, `numel` and `scale`. One thread
# adds all summands of an element, from the first to the last, in the accumulator's dtype, and rounds once.
#
# Additions and multiplications of float32 are spelt as instructions, which no option of the compiler
# fuses or lets flush subnormal numbers. Conversions of 16-bit floats are arithmetic on
# their bits, which rounds to the nearest, ties to even, on every device.
SOURCE = r"""
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef __HIP_DEVICE_COMPILE__
__device__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ float mul(float a, float b) { return __fmul_rn(a, b); }
#else
__device__ float add(float a, float b) {
    float sum;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b));
    return sum;
}
__device__ float mul(float a, float b) {
    float product;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
    return product;
}
#endif
__device__ double add(double a, double b) { return __dadd_rn(a, b); }
__device__ double mul(double a, double b) { return __dmul_rn(a, b); }

struct Float32 {
    typedef float stored;
    typedef float wide;
    __device__ static float widen(float x) { return x; }
    __device__ static float narrow(float x) { return x; }
};

struct Float64 {
    typedef double stored;
    typedef double wide;
    __device__ static double widen(double x) { return x; }
    __device__ static double narrow(double x) { return x; }
};

struct BFloat16 {
    typedef u16 stored;
    typedef float wide;
    __device__ static float widen(u16 x) { return __uint_as_float((u32)x << 16); }
    __device__ static u16 narrow(float x) {
        u32 bits = __float_as_uint(x);
        if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
        return (u16)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
    }
};

struct Float16 {
    typedef u16 stored;
    typedef float wide;
    __device__ static float widen(u16 x) {
        u32 sign = (u32)(x & 0x8000) << 16, exponent = (x >> 10) & 31, fraction = x & 1023;
        if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
        if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
        u32 small = __float_as_uint(mul((float)fraction, 5.9604644775390625e-8f));  // 2^-24
        return __uint_as_float(sign | small);
    }
    __device__ static u16 narrow(float x) {
        u32 bits = __float_as_uint(x), sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffffu;
        if (size > 0x7f800000u) return (u16)(sign | 0x7e00);
        if (size >= 0x477ff000u) return (u16)(sign | 0x7c00);  // from 65520: infinity
        if (size < 0x38800000u) {  // below 2^-14 the last bit is worth 2^-24, as that of 0.5
            u32 steps = __float_as_uint(add(__uint_as_float(size), 0.5f)) - 0x3f000000u;
            return (u16)(sign | steps);
        }
        size += 0xfffu + ((size >> 13) & 1);
        return (u16)(sign | ((size - 0x38000000u) >> 13));
    }
};

template <typename F>
__device__ void sum_floats(const u64* summands, int count, u64 out, long long numel, double scale) {
    long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < numel; i += step) {
        typename F::wide total = F::widen(((const typename F::stored*)summands[0])[i]);
        for (int k = 1; k < count; k++)
            total = add(total, F::widen(((const typename F::stored*)summands[k])[i]));
        if (scale != 1.0) total = mul(total, (typename F::wide)scale);
        ((typename F::stored*)out)[i] = F::narrow(total);
    }
}

template <typename T, bool either>
__device__ void sum_integers(const u64* summands, int count, u64 out, long long numel) {
    long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < numel; i += step) {
        T total = ((const T*)summands[0])[i];
        for (int k = 1; k < count; k++) {
            T next = ((const T*)summands[k])[i];
            total = either ? (T)(total | next) : (T)(total + next);
        }
        ((T*)out)[i] = total;
    }
}

#define ARGUMENTS const u64 *summands, int count, u64 out, long long numel, double scale
#define FLOATS(name, F) \
    extern "C" __global__ void name(ARGUMENTS) { sum_floats<F>(summands, count, out, numel, scale); }
#define INTEGERS(name, T, either) \
    extern "C" __global__ void name(ARGUMENTS) { sum_integers<T, either>(summands, count, out, numel); }

FLOATS(sum_float32, Float32)
FLOATS(sum_float64, Float64)
FLOATS(sum_float16, Float16)
FLOATS(sum_bfloat16, BFloat16)
INTEGERS(sum_bool, u8, true)
INTEGERS(sum_8, u8, false)
INTEGERS(sum_16, u16, false)
INTEGERS(sum_32, u32, false)
INTEGERS(sum_64, u64, false)
"""


def launch_sum_in_order(summands: Sequence[DeviceArray], out: DeviceArray, scale: float) -> bool:
    """`out` = `scale` times the sum, first to last; False, and nothing done, if there is no kernel."""
    kernel = SUM_KERNELS.get(out.dtype)
    if kernel is None:
        return False
    launch(
        SOURCE,
        kernel,
        -(-out.numel() // THREADS),
        to_device([summand.data_ptr() for summand in summands]),
        np.int32(len(summands)),
        np.uint64(out.data_ptr()),
        np.int64(out.numel()),
        np.float64(scale),
    )
    return True
