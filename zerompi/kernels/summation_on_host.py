"""The sum of float16 or bfloat16 on the host in one pass, bit for bit that of `collectives.summation`.

torch widens, adds and narrows in calls of their own, which takes several times as long as a sum of as
many bytes of float32. Here Numba, an optional package, compiles one loop for it, when it is first
needed: that takes a second or two. This is the one module that knows Numba.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1024  # values at a time, so that their sums stay in a core's nearest cache

# Arguments: a table of addresses of summands, how many, the address of the result, numel, scale.
# Other threads run during such a call.
_PROTOTYPE = ctypes.CFUNCTYPE(
    None,
    ctypes.c_void_p,
    ctypes.c_ssize_t,
    ctypes.c_void_p,
    ctypes.c_ssize_t,
    ctypes.c_float,
)


def is_installed() -> bool:
    """Whether there is a Numba to try."""
    return find_spec("numba") is not None


class SumOnHost:
    """Sums 1-D tensors of float16 or bfloat16, on the thread that calls it.

    Args:
        dtype: one of the two.

    Raises:
        Exception: Numba cannot be imported or does not compile it; of any type.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        is_bfloat16 = dtype is torch.bfloat16
        widen, narrow = _bfloat16_conversions() if is_bfloat16 else _float16_conversions()
        self._compiled = _compile(widen, narrow)  # its code lives as long as it does
        self._call = _PROTOTYPE(self._compiled.address)

    def __call__(self, summands: Sequence[Tensor], out: Tensor, scale: float) -> None:
        """`out` = `scale` times the sum from the first to the last, in float32; may be a summand."""
        table = (ctypes.c_void_p * len(summands))(*(s.data_ptr() for s in summands))
        self._call(table, len(summands), out.data_ptr(), out.numel(), scale)


def _compile(widen: Any, narrow: Any) -> Any:
    import numba
    from numba import types

    def total(summands: Any, count: int, out: Any, numel: int, scale: Any) -> None:
        sums = np.empty(_CHUNK, np.float32)
        for start in range(0, numel, _CHUNK):
            n = min(_CHUNK, numel - start)
            first = summands[0]
            if count == 1:
                for i in range(n):
                    sums[i] = widen(first[start + i])
            else:
                second = summands[1]
                for i in range(n):
                    sums[i] = widen(first[start + i]) + widen(second[start + i])
            for number in range(2, count):
                summand = summands[number]
                for i in range(n):
                    sums[i] += widen(summand[start + i])
            for i in range(n):
                out[start + i] = narrow(sums[i] * scale)

    values = types.CPointer(types.uint16)
    arguments = (types.CPointer(values), types.intp, values, types.intp, types.float32)
    return numba.cfunc(types.void(*arguments))(total)


def _bfloat16_conversions() -> tuple[Any, Any]:
    """To and from float32 by arithmetic on bits: to the nearest, ties to even.

    A NaN stays one: the half of its bits that goes is zero, as it was in the summand.
    """
    from numba import njit

    # Each result is cast: Numba computes with integers of 64 bits otherwise.
    def widen(bits: Any) -> Any:
        return np.uint32(bits << 16).view(np.float32)

    def narrow(value: Any) -> Any:
        bits = np.float32(value).view(np.uint32)
        # Half of the last place that is kept, or just less where that is even.
        half = np.uint32(0x7FFF + np.uint32(np.uint32(bits >> 16) & 1))
        return np.uint16(np.uint32(bits + half) >> 16)

    return njit(widen), njit(narrow)


def _float16_conversions() -> tuple[Any, Any]:
    """To and from float32 by LLVM's conversions, which are an instruction of the CPU each.

    Numba itself has no float16 on the host. Arithmetic on bits would be no faster than torch.
    """
    _require_float16_instructions()
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    half, single, bits = ir.HalfType(), ir.FloatType(), ir.IntType(16)

    def widen(typing: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.fpext(builder.bitcast(arguments[0], half), single)

        return types.float32(types.uint16), generate

    def narrow(typing: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(builder.fptrunc(arguments[0], half), bits)

        return types.uint16(types.float32), generate

    return intrinsic(widen), intrinsic(narrow)


def _require_float16_instructions() -> None:
    """LLVM calls functions that nobody has, and ends the process, where the CPU has none.

    Raises:
        RuntimeError: it has none, or Numba has been told to compile for another CPU.
    """
    from llvmlite import binding
    from numba import config

    is_host = config.CPU_NAME is None and config.CPU_FEATURES is None
    is_arm = platform.machine() in ("aarch64", "arm64")  # all of them have the instructions
    if not is_host or not (is_arm or binding.get_host_cpu_features().get("f16c")):
        raise RuntimeError("the CPU has no instructions that convert float16")
